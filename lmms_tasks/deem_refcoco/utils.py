"""What the RefCOCO task files refer to; lmms-eval runs this file anew for each reference."""

from lmms_eval.tasks.refcoco.utils import (  # noqa: F401
    refcoco_bleu1,
    refcoco_bleu2,
    refcoco_bleu3,
    refcoco_bleu4,
    refcoco_cider,
    refcoco_meteor,
    refcoco_process_result,
    refcoco_rougel,
)

from deem_plugin.evaluation.questions import doc_to_visual  # noqa: F401
from deem_plugin.evaluation.refcoco import doc_to_messages, doc_to_text  # noqa: F401
