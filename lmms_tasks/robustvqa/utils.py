"""What the RobustVQA task files refer to; lmms-eval runs this file anew for each reference."""

from deem_plugin.evaluation.questions import content_hash, doc_to_visual  # noqa: F401
from deem_plugin.evaluation.robustvqa import (  # noqa: F401
    doc_to_text,
    paper_messages,
    process_likelihoods,
    process_results,
    reworded_text,
    robustvqa_file,
)
from deem_plugin.evaluation.robustvqa_choice import (  # noqa: F401
    as_choices,
    choice_results,
    choice_text,
    order_bias,
    truth_first,
    truth_second,
)
from deem_plugin.evaluation.yes_no import (  # noqa: F401
    CHOICES,
    accuracy,
    auc,
    f1,
    pair_accuracy,
    precision,
    recall,
    unknown_rate,
    yes_ratio,
)


def __getattr__(name: str) -> str:
    """
    Finds the file of a split, `DATA_a` for one, or hashes its content (`CONTENT_a`), only when its task is run: YAML
    cannot read the environment.
    """
    if name.startswith("DATA_"):
        return robustvqa_file(name.removeprefix("DATA_"))
    if name.startswith("CONTENT_"):
        return content_hash(robustvqa_file(name.removeprefix("CONTENT_")))
    raise AttributeError(f"{__name__} has no attribute {name!r}")
