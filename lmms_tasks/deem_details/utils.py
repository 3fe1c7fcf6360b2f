"""What the details task file refers to; lmms-eval runs this file anew for each reference."""

from deem_plugin.evaluation.details import details_file, doc_to_text, process_results  # noqa: F401
from deem_plugin.evaluation.questions import content_hash, doc_to_visual  # noqa: F401
from deem_plugin.evaluation.yes_no import (  # noqa: F401
    accuracy,
    accuracy_by_category,
    pair_accuracy,
    unknown_rate,
    yes_ratio,
)


def __getattr__(name: str) -> str:
    """Finds the data, or hashes its content, only when the task is run: YAML cannot read the environment."""
    if name == "DATA":
        return details_file()
    if name == "CONTENT":
        return content_hash(details_file())
    raise AttributeError(f"{__name__} has no attribute {name!r}")
