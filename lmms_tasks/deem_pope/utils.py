"""What the POPE task files refer to; lmms-eval runs this file anew for each reference."""

from deem_plugin.evaluation.pope_task import doc_to_text, process_likelihoods, process_results  # noqa: F401
from deem_plugin.evaluation.questions import doc_to_visual  # noqa: F401
from deem_plugin.evaluation.yes_no import (  # noqa: F401
    CHOICES,
    accuracy,
    auc,
    f1,
    precision,
    recall,
    unknown_rate,
    yes_ratio,
)
