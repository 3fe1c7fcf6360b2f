"""What a recipe trains on, and the Trainer's part that reads it: order, resumption, and what was skipped."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from deem_plugin.data.examples import CountSkipped, EpochSampler, Examples
from deem_plugin.data.tables import Listing
from deem_plugin.training.recipes import Recipe, load_recipe
from deem_plugin.training.training_arguments import naming_training

logger = logging.getLogger(__name__)

STATE_FILE = "data_state.json"


def list_data(recipe: Recipe) -> list[Listing]:
    """
    Lists the data sets of a recipe, reading no record yet.

    Raises:
        ValueError: If one is missing or not as described.
    """
    from deem_plugin.data.conversations import list_conversations
    from deem_plugin.data.document_files import list_documents
    from deem_plugin.data.region_sets import list_regions
    from deem_plugin.data.shards import list_interleaved, list_pairs, list_pictures

    data, args = recipe.data, recipe.training
    processes = max(args.dataloader_num_workers, 1)
    if recipe.model.encoder:
        return [list_pictures(data.path, processes=processes)]
    if data.kind == "conversations":
        return [list_conversations(data.path, data.image_dir, allow_outside=data.allow_outside)]
    if data.kind == "documents":
        return [list_documents(data.path, data.image_dir, allow_outside=data.allow_outside)]
    if data.kind == "regions":
        return [list_regions(source, f"`data.sources[{number}]`") for number, source in enumerate(data.sources)]
    options = {"incomplete": data.on_error == "skip", "processes": processes}
    listings = []
    if data.interleaved is not None:
        listings.append(list_interleaved(data.interleaved, seed=_seed(args), **options))
    if data.pairs is not None:
        listings.append(list_pairs(data.pairs, **options))
    return listings


def load_examples(recipe: Recipe) -> Examples:
    """
    Reads the data sets of a recipe into memory-mapped tables.

    Raises:
        ValueError: If one is not as described, or (with `data.on_error: raise`) a sample is broken.
    """
    data, args = recipe.data, recipe.training
    weights = None
    if data.kind == "shards":
        given = zip((data.interleaved, data.pairs), data.weights, strict=True)
        weights = [weight for shards, weight in given if shards is not None]
    with args.main_process_first(desc="reading the data"):
        return Examples.of(list_data(recipe), data.on_error, data.cache_dir, weights=weights, seed=_seed(args))


def check_data(name: str, overrides=()) -> Iterator[tuple[str, bool]]:
    """
    Yields what `deem data check` prints of the data of the recipe `name`, and whether it is wrong: each sample
    that cannot be used or opened, and for each data set what is left.
    """
    recipe = load_recipe(name, overrides)
    for listing in list_data(recipe):
        checked = listing.check(recipe.data.cache_dir).opened(listing.open)
        yield from ((problem, True) for problem in checked.problems)
        yield str(checked), False


def _seed(args) -> int:
    return args.seed if args.data_seed is None else args.data_seed


class ExamplesTrainer(Trainer):
    """
    A Trainer that reads `Examples` in an order of their own for each epoch, and says what was skipped.

    Order and draws depend on the seed and the place in the run alone: a resumed run goes on as if it had not stopped.
    """

    def __init__(self, *args, **kwargs):
        with naming_training():
            super().__init__(*args, **kwargs)
        self.data_collator = CountSkipped(self.data_collator)
        self.skipped = SkippedSamples(self.train_dataset)
        self.add_callback(self.skipped)

    def get_train_dataloader(self):
        """As the stock method."""
        with naming_training():
            return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        batch = self._train_batch_size * self.args.world_size
        return EpochSampler(len(self.train_dataset), batch, _seed(self.args))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Also takes what was skipped out of the batches."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            self.skipped.here.update(batch.pop("skipped"))
        return batches, num_items

    def log(self, logs, start_time=None):
        """Adds how many samples, ends of samples and pictures were skipped so far, by reason."""
        if "loss" in logs:
            logs |= {f"skipped_{reason.replace(' ', '_')}": count for reason, count in self.skipped.total().items()}
        super().log(logs, start_time)


class SkippedSamples(TrainerCallback):
    """
    Counts what could not be opened, over all workers and ranks and from the beginning of a run that was resumed, and
    sees that a run is resumed on the data that it began with.

    Args:
        examples (`Examples`): What is read.
    """

    def __init__(self, examples: Examples):
        self.examples = examples
        self.before: Counter[str] = Counter()  # of all ranks, up to the checkpoint
        self.here: Counter[str] = Counter()  # of this rank

    def total(self) -> Counter[str]:
        """Returns the counts by reason; all ranks must call."""
        return sum(gather_object([self.here]), self.before)

    def on_train_begin(self, args, state, control, **kwargs):
        """Goes on from the counts of the checkpoint; raises a `ValueError` if that was of other data."""
        file = Path(args.resume_from_checkpoint or ".") / STATE_FILE
        if not args.resume_from_checkpoint or not file.is_file():
            return
        saved = json.loads(file.read_text(encoding="utf-8"))
        if saved["data"] != self.examples.layout:
            raise ValueError(
                f"The run of {file.parent} cannot go on: its data were {saved['data']} and are "
                f"{self.examples.layout}. Resume with what the run was started with."
            )
        self.before = Counter(saved["skipped"])

    def on_save(self, args, state, control, **kwargs):
        """Writes the counts into the checkpoint."""
        content = {"data": self.examples.layout, "skipped": self.total()}
        if args.should_save:
            file = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / STATE_FILE
            file.write_text(json.dumps(content), encoding="utf-8")

    def on_train_end(self, args, state, control, **kwargs):
        """Says how much of the run was skipped."""
        total = self.total()
        if state.is_world_process_zero and total:
            counts = ", ".join(f"{count} {reason}" for reason, count in total.most_common())
            logger.warning("Skipped in the run: %s.", counts)
