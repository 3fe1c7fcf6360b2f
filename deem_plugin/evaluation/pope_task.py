"""POPE's questions as the tasks `deem_pope*` ask and score them (https://arxiv.org/abs/2305.10355)."""

from deem_plugin.evaluation import yes_no

METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")
# As lmms-eval's own POPE tasks ask, so that the accuracies compare.
INSTRUCTION = "\nAnswer the question using a single word or phrase."


def doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """Returns the question with the instruction of lmms-eval's own task."""
    return doc["question"].strip() + INSTRUCTION


def process_results(doc: dict, results: list[str]) -> dict[str, dict]:
    """Returns the metric rows of one generated answer."""
    return yes_no.score(_question(doc), results, "deem_pope", (*METRICS, "unknown_rate"))


def process_likelihoods(doc: dict, results: list) -> dict[str, dict]:
    """Returns the metric rows of the likelihoods of yes and no."""
    return yes_no.score_likelihoods(_question(doc), results, "deem_pope", (*METRICS, "auc"))


def _question(doc: dict) -> dict:
    """Returns ids and answer as `yes_no.score` takes them. POPE's own ids are unique in each split only."""
    return {
        "question_id": f"{doc['category']}-{doc['question_id']}",
        "image_id": doc["image_source"],
        "category": doc["category"],
        "answer": doc["answer"].strip().lower(),
    }
