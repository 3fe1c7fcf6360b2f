"""The interleaved model in lmms-eval: found by the Auto classes, answering as it does by itself."""

import pytest

from ..models.tiny_deem import tiny_deem
from .test_lmms import GREEDY, chat, chat_requests, docs  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deem")
    model, processor = tiny_deem()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_a_batch_answers_what_each_prompt_alone_does(checkpoint, docs):  # noqa: F811
    model = chat(checkpoint, docs, batch_size=3, raw_answers=True)

    together = model.generate_until(chat_requests(docs))

    assert type(model.model).__name__ == "DeemForConditionalGeneration"
    alone = chat(checkpoint, docs, batch_size=1, raw_answers=True)
    assert together == alone.generate_until(chat_requests(docs))
    assert len(set(together)) > 1


def test_it_answers_yes_or_no_by_log_likelihood(checkpoint, docs):  # noqa: F811
    questions = [{**doc, "question": f"Is it {index}? Answer yes or no."} for index, doc in enumerate(docs)]

    answers = chat(checkpoint, questions, batch_size=2, answer_by="loglikelihood").generate_until(
        chat_requests(questions, **GREEDY)
    )

    assert set(answers) <= {"yes", "no"}
