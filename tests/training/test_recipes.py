import pytest

from deem_plugin.feedback.config import DiffusionModelConfig, ObjectiveConfig, RossConfig
from deem_plugin.settings import changed_settings
from deem_plugin.training.recipes import build_recipe, list_recipes, load_recipe

SECTIONS = {"model": {"model": "m"}, "data": {"path": "d"}}
MINIMAL = "model: {model: m}\ndata: {path: d}\n"


@pytest.fixture
def write(tmp_path):
    """Writes a recipe file and returns its path."""

    def write(text, name="mine"):
        (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path / f"{name}.yaml"

    return write


def test_a_recipe_is_read_from_its_sections(write):
    text = (
        MINIMAL + "feedback: {diffusion_model: {path: sd}, weight: 2}\ntraining: {learning_rate: 1e-5, max_steps: 7}\n"
    )

    recipe = load_recipe(write(text))

    assert (recipe.name, recipe.model.model, recipe.data.path) == ("mine", "m", "d")
    assert (recipe.feedback.diffusion_model.path, recipe.feedback.weight) == ("sd", 2.0)
    assert (recipe.training.learning_rate, recipe.training.max_steps) == (1e-5, 7)
    assert recipe.training.output_dir == "runs/mine"
    assert recipe.training.remove_unused_columns is False


def test_no_feedback_section_means_no_feedback(write):
    assert load_recipe(write(MINIMAL)).feedback is None
    assert load_recipe(write(MINIMAL + "feedback: null\n")).feedback is None


def test_a_recipe_extends_another_key_by_key(write):
    write(MINIMAL + "feedback: {weight: 2}\ntraining: {max_steps: 7, seed: 3}\n", "parent")

    recipe = load_recipe(write("extends: parent\nfeedback: null\ntraining: {max_steps: 9}\n"))

    assert recipe.feedback is None
    assert (recipe.training.max_steps, recipe.training.seed, recipe.model.model) == (9, 3, "m")


def test_a_recipe_extends_the_parts_of_a_section_key_by_key_and_other_values_as_a_whole(write):
    parent = "feedback: {diffusion_model: {path: sd, dtype: bfloat16}, objective: {draws_per_image: 2}}\n"
    write(MINIMAL.replace("m}", "m, learning_rates: {a: 1e-3}}") + parent, "parent")
    own = "model: {learning_rates: {b: 1e-4}}\nfeedback: {diffusion_model: {path: other}, objective: null}\n"

    recipe = load_recipe(write("extends: parent\n" + own), ["feedback.diffusion_model.image_size=64"])

    assert recipe.feedback.diffusion_model == DiffusionModelConfig("other", dtype="bfloat16", image_size=64)
    assert recipe.feedback.objective == ObjectiveConfig()
    assert recipe.model.learning_rates == {"b": 1e-4}


def test_ross_has_a_section_of_its_own_whose_parts_keep_their_defaults(write):
    recipe = load_recipe(write(MINIMAL + "ross: {autoencoder: sd, objective: {draws_per_image: 2}}\n"))

    assert recipe.feedback == RossConfig("sd", objective=ObjectiveConfig("mse", "uniform", draws_per_image=2))
    assert changed_settings(recipe.feedback) == {"autoencoder": "sd", "objective": {"draws_per_image": 2}}
    assert build_recipe("again", {**SECTIONS, "ross": changed_settings(recipe.feedback)}).feedback == recipe.feedback


def test_a_recipe_that_extends_itself_is_an_error(write):
    write("extends: two\n", "one")
    with pytest.raises(ValueError, match="extends itself"):
        load_recipe(write("extends: one\n", "two"))


def test_overrides_are_yaml_values(write):
    overrides = ["model.freeze=[lm_head]", "model.learning_rates={vision_tower: 1e-6}", "data.max_length=12"]
    overrides += ["feedback.diffusion_model.path=sd", "training.bf16=false"]

    recipe = load_recipe(write(MINIMAL), overrides)

    assert recipe.model.freeze == ["lm_head"]
    assert recipe.model.learning_rates == {"vision_tower": 1e-6}
    assert recipe.data.max_length == 12
    assert recipe.feedback.diffusion_model.path == "sd"
    assert load_recipe(write(MINIMAL), ["feedback.weight=2", "feedback=null"]).feedback is None


def test_a_chat_template_beside_the_recipe_is_found(write, tmp_path):
    (tmp_path / "mine.jinja").write_text("x")

    recipe = load_recipe(write("model: {model: m, chat_template: mine.jinja}\ndata: {path: d}\n"))

    assert recipe.model.chat_template == str(tmp_path / "mine.jinja")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["feedback.wieght=3"],
            "Unknown key in `feedback` 'wieght' .*did you mean 'weight'.*Choices: weight, in_eval",
        ),
        (
            ["feedback.diffusion_model.pth=x"],
            "Unknown key in `feedback.diffusion_model` 'pth' in the recipe 'mine'; did you mean 'path'.*Choices: path",
        ),
        (["feedback.diffusion_model.path.x=1"], "Unknown key in `feedback.diffusion_model` 'path.x'.* mean 'path'"),
        (["feedback.latent_cach=x"], "'latent_cach' in the recipe.*did you mean 'diffusion_model.latent_cache'"),
        (
            ["feedback.condition=cls"],
            "`feedback.condition` must hold `key: value` lines with keys of kind, num_patches.*got 'cls'",
        ),
        (["feedback.condition.num_queries=many"], "`feedback.condition.num_queries` must be of kind int, got 'many'"),
        (["feedback.objective.kind=mae"], "`objective.kind` must be one of mse, contrastive, got 'mae'"),
        (["ross.autoencoder=x"], "sections `feedback` and `ross`, each of which is a feedback.*`feedback=null`"),
        (
            ["feedback=null", "ross.objective.draws_per_img=2"],
            "Unknown key in `ross.objective` 'draws_per_img' .*'draws_per_image'",
        ),
        (
            ["feedback=null", "ross.autoencoder=x", "model.model=null", "model.encoder=e"],
            "`model.encoder: e` trains an encoder alone, and `ross` restores",
        ),
        (["training.learning_rat=3"], "Unknown key in `training` 'learning_rat' .*did you mean 'learning_rate'"),
        (["model.modle=x"], "Unknown key in `model` 'modle'.*did you mean .*'model'"),
        (
            ["modle.model=x"],
            "Unknown section 'modle'.*did you mean 'model'.*Choices: model, data, feedback, ross, deem, denoiser",
        ),
        (["max_steps=3"], "Cannot read the override 'max_steps=3'; expected `section.key=value`"),
        (["model.freeze"], "Cannot read the override 'model.freeze'"),
        (["model.freeze=[a"], "is no valid YAML"),
        (["model.freeze=vision_tower"], "`model.freeze` must be of kind list, got 'vision_tower'"),
        (["model.lora.r=much"], "`model.lora.r` must be of kind int, got 'much'"),
        (["model.lora.r=true"], "`model.lora.r` must be of kind int, got True"),
        (["model.learning_rates={a: b}"], "`model.learning_rates.a` must be a number, got 'b'"),
        (["training.max_steps=many"], "`training.max_steps` must be of kind int, got 'many'"),
        (["training.max_steps=2.5"], "`training.max_steps` must be of kind int, got 2.5"),
        (["training.learning_rate=[1, 2]"], r"`training.learning_rate` must be of kind float, got \[1, 2\]"),
        (["training.learning_rate=.nan"], "`training.learning_rate` must be a number from 0 up, got nan"),
        (
            ["training.gradient_accumulation_steps=0"],
            "`training.gradient_accumulation_steps` must be at least 1, got 0",
        ),
        (["training.max_steps=0"], "`training.max_steps` is 0 and .* nothing would train"),
        (["training.save_steps=0"], "`training.save_steps` must be above 0, got 0"),
        (["training.dataloader_num_workers=-1"], "`training.dataloader_num_workers` must be at least 0, got -1"),
        (["training.optim=adamm"], "The section `training` cannot be used: adamm is not a valid OptimizerNames"),
        (["training.metric_for_best_model=3"], "The section `training` cannot be used"),
        (["training.eval_strategy=steps"], "A recipe has no data for `training.eval_strategy`"),
        (["training.eval_on_start=true"], "A recipe has no data for `training.eval_strategy`"),
        (["training.seed=-1"], "`training.seed` and `data_seed` must be from 0 to 2..32 - 1, got -1, None"),
        (["model.lora.r=-1"], "`model.lora` needs r >= 0 .* got -1 and 0.05"),
        (["feedback.condition.num_queries=0"], "`num_queries` must be at least 1, got 0"),
        (["feedback.condition.resampler_layers=0"], "`resampler_layers` must be at least 1, got 0"),
        (["training.learning_rate=fast"], "`training.learning_rate` must be a number, got 'fast'"),
        (["model.dtype=float8"], "`model.dtype` must be one of auto, float32, bfloat16, float16, got 'float8'"),
        (["model.encoder=x"], r"exactly one of `model`, `language_model`, `encoder`.*got \['model', 'encoder'\]"),
        (["model.model=null"], "exactly one of .*got none"),
        (["model.model=null", "model.language_model=x"], "`model.language_model` needs `model.vision_tower`"),
        (["model.image_size=3"], "`model.image_size` belongs to `model.vision_tower`, which is not set"),
        (["data.path=null"], "does not say what to train on. Set `data.path`"),
        (["feedback.weight=-1"], "`weight` must be a finite number, zero or positive, got -1"),
    ],
)
def test_wrong_settings_are_errors_that_say_what_is_expected(write, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(MINIMAL + "feedback: {diffusion_model: {path: sd}}\n"), overrides)


def test_a_strategy_of_no_needs_no_quotes(write):
    """YAML reads `no` as false."""
    assert load_recipe(write(MINIMAL), ["training.save_strategy=no"]).training.save_strategy == "no"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {model: a, model: b}\n", "the key 'model' stands twice"),
        ("extends: 3\n", "`extends` of the recipe .* must be the name of a recipe, got 3"),
        ("model: {model: m, chat_template: 3}\n", "`model.chat_template` must be of kind str, got 3"),
        ("3: {}\n", "Unknown section 3"),
    ],
)
def test_a_file_that_is_no_recipe_is_an_error_that_says_why(write, text, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(text))


def test_a_recipe_in_another_encoding_is_an_error_that_names_the_file(write):
    path = write("")
    path.write_bytes("model: {model: é}".encode("latin-1"))

    with pytest.raises(ValueError, match="mine.yaml is no valid YAML in UTF-8"):
        load_recipe(path)


def test_an_unknown_key_in_the_file_is_an_error(write):
    with pytest.raises(ValueError, match="Unknown section 'trainign' in the recipe 'mine'; did you mean 'training'"):
        load_recipe(write(MINIMAL + "trainign: {}\n"))
    with pytest.raises(ValueError, match="section `training` .* must hold `key: value` lines, got 3"):
        load_recipe(write(MINIMAL + "training: 3\n"))


def test_unknown_recipes_are_errors_that_list_the_shipped_ones():
    with pytest.raises(ValueError, match="Unknown recipe 'deeem'; did you mean 'deem'.*tiny-tune"):
        load_recipe("deeem")
    with pytest.raises(ValueError, match="no recipe file nowhere/mine.yaml. Shipped recipes: .*deem"):
        load_recipe("nowhere/mine.yaml")


def test_the_baseline_differs_from_the_feedback_recipe_by_the_feedback_alone():
    # A CPU refuses bf16's hardware checks of the real settings; they are the same in both.
    overrides = ["training.bf16=null", "training.tf32=null", "training.fsdp=null", "training.output_dir=out"]
    with_feedback, without = (load_recipe(f"llava-1.5-7b-{name}", overrides) for name in ("feedback", "baseline"))

    assert without.feedback is None
    assert with_feedback.feedback.weight == 5.0
    assert with_feedback.training.to_dict() == without.training.to_dict()
    assert with_feedback.data == without.data
    rates = dict(with_feedback.model.learning_rates)
    del rates["feedback_conditioner"]
    assert without.model.learning_rates == rates


def test_recipes_can_be_built_without_a_file():
    assert build_recipe("name", SECTIONS).training.output_dir == "runs/name"


def test_every_shipped_recipe_explains_itself():
    from deem_plugin.resources import recipes_dir

    for name in list_recipes():
        text = (recipes_dir() / f"{name}.yaml").read_text()
        assert text.startswith("# ") and "Hardware:" in text, f"{name} has no header"
