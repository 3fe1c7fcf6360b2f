"""Faults of recipes and of overrides: files, keys, kinds of values, values out of range."""

import os

from .rows import Row

BOMB = "x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


def override(text, says, code=1, **options):
    """An override of the recipe `tiny-tune`."""
    return Row(f"the override {text}", lambda place: place.train(text), says, code, **options)


def recipe(name, content, says, **options):
    """A recipe file."""
    return Row(name, lambda place: ["train", place.file("given.yaml", content)], says, **options)


OVERRIDES = [
    override("training.lerning_rate=1", "Unknown key in `training` 'lerning_rate'.*did you mean 'learning_rate'"),
    override("trainig.max_steps=1", "Unknown section 'trainig'.*Choices"),
    override("training.max_steps", "Cannot read the override 'training.max_steps'"),
    override("max_steps=3", "Cannot read the override 'max_steps=3'"),
    override("=3", "Cannot read the override '=3'"),
    override("model.learning_rates.vision_tower=1e-5", "Unknown key in `model` 'learning_rates.vision_tower'"),
    override("training.max_steps=[1", r"override 'training.max_steps=\[1' is no valid YAML"),
    override('training.max_steps=!!python/object/apply:os.system ["true"]', "override.*no valid YAML"),
    override("training.max_steps=&a [*a]", "`training.max_steps`"),
    override("training.max_steps=\x00", "override.*no valid YAML"),
    override("training.max_steps=many", "`training.max_steps` must be of kind int, got 'many'"),
    override("training.max_steps=2.5", "`training.max_steps` must be of kind int, got 2.5"),
    override("training.max_steps=0", "`training.max_steps` is 0.*nothing would train"),
    override("training.max_steps=" + "9" * 5000, "training.max_steps"),
    override("training.num_train_epochs=.nan", "num_train_epochs.*nan"),
    override("training.learning_rate=[1,2]", r"`training.learning_rate` must be .*\[1, 2\]"),
    override("training.learning_rate=.nan", "`training.learning_rate` must be a number from 0 up, got nan"),
    override("training.learning_rate=-1.0", "`training.learning_rate` must be a number from 0 up, got -1.0"),
    override("training.learning_rate=.inf", "`training.learning_rate` must be a number from 0 up, got inf"),
    override("training.learning_rate=fast", "`training.learning_rate` must be a number, got 'fast'"),
    override("training.max_grad_norm=.nan", "`training.max_grad_norm` must be .*nan"),
    override("training.max_grad_norm=-1", "`training.max_grad_norm` must be .*-1"),
    override("training.weight_decay=.nan", "`training.weight_decay` must be .*nan"),
    override("training.warmup_steps=-3", "warmup_steps.*-3"),
    override("training.warmup_steps=.nan", "`training.warmup_steps` must be .*nan"),
    override("training.per_device_train_batch_size=0", "per_device_train_batch_size` must be at least 1, got 0"),
    override("training.per_device_train_batch_size=-1", "per_device_train_batch_size` must be at least 1, got -1"),
    override("training.gradient_accumulation_steps=0", "gradient_accumulation_steps` must be at least 1, got 0"),
    override("training.dataloader_num_workers=-1", "dataloader_num_workers` must be at least 0, got -1"),
    override("training.logging_steps=0", "training.*logging_steps"),
    override("training.logging_steps=.nan", "`training.logging_steps` must be .*nan"),
    override("training.seed=-1", "`training.seed` and `data_seed` must be .* got -1"),
    override("training.seed=" + "9" * 12, "`training.seed` and `data_seed` must be .*999"),
    override("training.data_seed=-3", "must be .*-3"),
    override("training.save_strategy=never", "training.*never"),
    override("training.save_total_limit=-1", "`training.save_total_limit` must be at least 1, got -1"),
    override("training.eval_strategy=steps", "no data for `training.eval_strategy`"),
    override("training.report_to=wanbd", "wanbd", slow=True),
    override("training.optim=adamm", "training.*adamm", slow=True),
    override("training.lr_scheduler_type=cosin", "training.*cosin"),
    override("training.resume_from_checkpoint=true", "resume_from_checkpoint.*True"),
    override("training.resume_from_checkpoint=latest", "latest"),
    override("training.resume_from_checkpoint=/nowhere", "/nowhere"),
    override("training.output_dir=/proc/deem", "/proc/deem"),
    override("training.output_dir=/dev/null", "/dev/null"),
    override("training.deepspeed=/nowhere.json", "training.*(deepspeed|nowhere.json)"),
    override("training=3", "Cannot read the override"),
    override("training=null", "Cannot read the override"),
    override("feedback.weight=true", "`feedback.weight` must be of kind float, got True"),
    override("feedback.weight=-5.0", "`weight` must be a finite number, zero or positive, got -5.0"),
    override("feedback.weight=.nan", "`weight` must be a finite number, zero or positive, got nan"),
    override("feedback.weight=.inf", "`weight` must be a finite number, zero or positive, got inf"),
    override("feedback.anchor_weight=.nan", "`anchor_weight` must be a finite number.*nan"),
    override("feedback.seed=-7", "`seed` must be .*-7"),
    override("feedback.seed=" + "9" * 30, "`seed` must be .*999"),
    override("feedback.image_mean=[a,b]", "image_mean.*'a'|Give both"),
    override("feedback.condition.num_queries=4.5", "`feedback.condition.num_queries` must be of kind int, got 4.5"),
    override("feedback.condition.num_queries=0", "`num_queries` must be at least 1, got 0"),
    override(
        "feedback.condition.resampler_heads=3", r"`resampler_dim` \(16\) must be a multiple of `resampler_heads`"
    ),
    override("feedback.condition.kind=quries", "`condition.kind` must be one of queries.*'quries'"),
    override("feedback.condition=queries", "`feedback.condition` must hold `key: value` lines"),
    override("feedback.objective.timestep_sampling=shrnk", "`timestep_sampling` must be one of shrink.*'shrnk'"),
    override("feedback.diffusion_model.image_size=-32", "`image_size` must be at least 1, got -32"),
    override("feedback.diffusion_model.image_size=33", "`image_size` is 33.*multiple", slow=True),
    override("feedback.diffusion_model.dtype=fp16", "`dtype` must be one of float32.*'fp16'"),
    override("feedback.diffusion_model.path=/nowhere/sd", "/nowhere/sd", slow=True),
    override("feedback.diffusion_model.path=somebody/nope", "somebody/nope", slow=True),
    override("model.freeze=[vision_towr]", "'vision_towr' of `model.freeze` matches no parameter"),
    override("model.freeze=[1]", r"`model.freeze\[0\]` must be of kind str, got 1"),
    override("model.freeze=vision_tower", "`model.freeze` must be of kind list"),
    override("model.learning_rates={vision_towr: 1e-5}", "vision_towr", slow=True),
    override("model.learning_rates={vision_tower: .nan}", "learning_rates.*vision_tower.*nan"),
    override("model.learning_rates={vision_tower: -1}", "learning_rates.*vision_tower.*-1"),
    override("model.dtype=fp16", "`model.dtype` must be one of auto.*'fp16'"),
    override("model.attn_implementation=flsh", "flsh"),
    override("model.lora.r=-1", "`model.lora` needs r >= 0"),
    override("model.lora={r: 2, modules: [langage_model]}", "langage_model"),
    override("model.model=null", "must name exactly one of"),
    override("model.chat_template=nowhere.jinja", "chat template nowhere.jinja does not exist"),
    override("data.max_length=0", "`data.max_length` must be at least 1, got 0"),
    override("data.max_length=-3", "`data.max_length` must be at least 1, got -3"),
    override("data.max_length=5", "`data.max_length` = 5 tokens would cut an image", slow=True),
    override("data.kind=conversation", "`data.kind` must be one of conversations.*'conversation'"),
    override("data.on_error=ignore", "`.*on_error` is 'ignore'; expected one of raise, skip"),
    override("data.weights=[1]", "`data.weights`"),
    override("data.crop_area=2.0", r"`data.crop_area` is a share.*2.0"),
    override("data.path=null", "does not say what to train on"),
    override("data.image_dir=/nowhere", "/nowhere does not exist"),
    override("data.cache_dir=/proc/none", "/proc/none"),
    override("feedback.weight=1e30", "Saved", code=0, slow=True),
    override("training.save_strategy=no", "Saved", code=0, slow=True),
]


def _latin(place):
    return ["train", place.file("given.yaml", b"model:\n  model: \xe9\n")]


def _pipe(place):
    os.mkfifo(place.folder / "given.yaml")
    return ["train", place.folder / "given.yaml"]


FILES = [
    recipe("a recipe of a list", "- a\n- b\n", r"given.yaml must hold the sections.*\['a', 'b'\]"),
    recipe("a recipe of a number", "3", "given.yaml must hold the sections"),
    recipe("an empty recipe", "", "must name exactly one of"),
    recipe("a binary recipe", "\x00\x01", "given.yaml is no valid YAML"),
    recipe("a recipe with tabs", "model:\n\tmodel: a\n", "given.yaml is no valid YAML"),
    recipe("a recipe with a key twice", "model: {model: a}\nmodel: {model: b}\n", "'model' stands twice"),
    recipe("a recipe with a list as key", "? [a]\n: 1\n", "given.yaml is no valid YAML"),
    recipe("a recipe that extends itself", "extends: given\n", "extends itself"),
    recipe("a recipe that extends a list", "extends: [a, b]\n", "`extends` of the recipe .*given.yaml must be"),
    recipe("a recipe that extends a number", "extends: 3\n", "`extends` of the recipe .*given.yaml must be"),
    recipe("a recipe that extends nothing", "extends: nothing\n", "Unknown recipe 'nothing'"),
    recipe("a section that is a number", "extends: tiny-tune\n3: {a: 1}\n", "Unknown section 3"),
    recipe("a section that is a text", "extends: tiny-tune\nmodel: a\n", "section `model` of .*'a'"),
    recipe("a key that is a number", "extends: tiny-tune\ntraining: {3: 1}\n", "Unknown key in `training` 3"),
    recipe("a template that is a number", "extends: tiny-tune\nmodel: {chat_template: 3}\n", "`model.chat_template`"),
    recipe("a bomb of aliases", BOMB + "model: *x9\n", "Unknown section 'x0'"),
    recipe("a deep recipe", "model: " + "[" * 5000, "given.yaml is no valid YAML"),
    recipe(
        "a recipe of YAML objects", "model: !!python/object/apply:os.system [true]\n", "given.yaml is no valid YAML"
    ),
    Row("a recipe in Latin-1", _latin, "given.yaml is no valid YAML in UTF-8"),
    Row("a recipe that is a pipe", _pipe, "no recipe file .*given.yaml"),
    Row("a recipe that is a folder", lambda place: ["train", place.empty()], "no recipe file .*empty"),
    Row("a recipe with a typo", lambda place: ["train", "tiny-tun"], "Unknown recipe 'tiny-tun'; did you mean"),
    Row("a recipe of nothing", lambda place: ["train", ""], "recipe"),
    Row("no recipe", lambda place: ["train"], "required: recipe", code=2, lines=4),
    Row("no command", lambda place: [], "required: COMMAND", code=2, lines=4),
    Row("an unknown option", lambda place: ["train", "tiny-tune", "--steps", "3"], "--steps", code=2, lines=4),
    Row("a recipe without overrides", lambda place: ["train", "tiny-tune"], "data set at|bf16|cannot be used"),
]

ROWS = [*OVERRIDES, *FILES]
