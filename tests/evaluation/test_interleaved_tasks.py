"""lmms-eval's own tasks that the interleaved model has a way of its own in, offline, from a shell."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import lmms_eval.tasks
import pytest
from datasets import Dataset, Features, Image, List, Value
from datasets.packaged_modules.parquet.parquet import Parquet

from deem_plugin.data.region_sources import DESCRIBE_QUESTION
from deem_plugin.evaluation.loading import load_vlm
from deem_plugin.evaluation.offline import write_to_cache

from ..feedback.tiny_diffusion_models import save_diffusion_model
from ..models.tiny_deem import tiny_deem
from ..tiny import tiny_image
from .helpers import evaluated, offline_env

STOCK_TASKS = Path(lmms_eval.tasks.__file__).parent


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a tiny model and diffusion model, and an environment without a network."""
    folder = tmp_path_factory.mktemp("workplace")
    model, processor = tiny_deem()
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(folder / "deem")
    processor.save_pretrained(folder / "deem")
    save_diffusion_model(folder / "diffusion_model", "sd1")
    return folder, offline_env(folder) | {"LMMS_EVAL_DATASETS_CACHE": str(folder / "cache")}


def rows_of(folder, task):
    log = next(folder.rglob(f"*_samples_{task}.jsonl")).read_text().splitlines()
    return sorted(map(json.loads, log), key=lambda row: row["doc_id"])


@pytest.mark.slow
def test_refcoco_is_asked_about_regions(workplace):
    """Two regions of one picture: what the task scores is what the model says of each, nothing drawn on it."""
    folder, env = workplace
    image = tiny_image(0, (96, 64))
    rows = [
        {
            "question_id": str(index),
            "image": image,
            "answer": ["a noisy square", "the noise"],
            "segmentation": [left, 0, left + 30, 0, left + 30, 50, left, 50],
            "bbox": [left, 0, 30, 50],
        }
        for index, left in enumerate((0, 60))
    ]
    lists = {"answer": List(Value("string"))} | dict.fromkeys(("segmentation", "bbox"), List(Value("float32")))
    features = Features({"question_id": Value("string"), **lists, "image": Image()})
    Dataset.from_list(rows, features).to_parquet(folder / "refcoco.parquet")
    builder = Parquet(
        cache_dir=folder / "cache",
        dataset_name="RefCOCO",
        config_name="default",
        data_files={"val": [str(folder / "refcoco.parquet")]},
    )
    builder.download_and_prepare(output_dir=str(folder / "cache/lmms-lab-encoder___ref_coco/default/0.0.0/local"))
    limit = ["--gen_kwargs", "max_new_tokens=8"]

    evaluated(
        {"pretrained": folder / "deem"}, "deem_refcoco_val", folder / "refcoco", batch_size=2, env=env, more=limit
    )

    model, processor = load_vlm(str(folder / "deem"))
    expected = []
    for row in rows:
        left, top, width, height = row["bbox"]
        box = (left, top, left + width, top + height)  # these outlines are rectangles
        inputs = processor(text=f"<image>{DESCRIBE_QUESTION}", images=[image], regions=[box], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        expected.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    logged = [row["refcoco_METEOR"]["pred"] for row in rows_of(folder / "refcoco", "deem_refcoco_val")]
    assert logged == expected and logged[0] != logged[1]


class Judge(BaseHTTPRequestHandler):
    """A stand-in for the judge of WISE, which speaks OpenAI's protocol: full marks for every picture it is shown."""

    shown: list[str] = []

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = [part for message in request["messages"] for part in message["content"] if isinstance(part, dict)]
        self.shown += [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        text = "Consistency: 2\nRealism: 2\nAesthetic Quality: 2"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        reply = json.dumps(
            {"id": "0", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        """Says nothing."""


@pytest.mark.slow
def test_wise_judges_the_pictures_that_were_drawn(workplace):
    folder, env = workplace
    columns = {"prompt_id": "int64"} | dict.fromkeys(("Prompt", "Explanation", "Category", "Subcategory"), "string")
    prompts = [
        {"prompt_id": number, "Prompt": prompt, "Explanation": prompt, "Category": "C", "Subcategory": "S"}
        for number, prompt in ((1, "a red square"), (400, "a blue circle"))
    ]
    write_to_cache("Yuwei-Niu/WISE", columns, prompts, lambda row: [("default", "test")], folder / "cache")
    server = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge = {"WISE_API_KEY": "none", "WISE_BASE_URL": f"http://127.0.0.1:{server.server_port}/v1"}
    model_args = {"pretrained": folder / "deem", "diffusion_model": folder / "diffusion_model"}
    model_args |= {"image_dir": folder / "images", "steps": 2}

    results = evaluated(model_args, "WISE", folder / "wise", batch_size=2, env=env | judge)

    server.shutdown()
    assert results["results"]["WISE"]["WISE_culture_score,none"] == pytest.approx(1.0)
    pictures = sorted((folder / "images" / "WISE").iterdir())
    assert [path.name for path in pictures] == ["000000.png", "000001.png"]
    assert len(set(Judge.shown)) == 2


@pytest.mark.slow
def test_a_task_with_a_drawn_step_is_answered(workplace):
    """The stock task's YAML but for where its data lie: it names an address on the hub."""
    folder, env = workplace
    rows = [
        {"image": tiny_image(index), "question": "How many?", "answer": "3", "type": "human_test"}
        for index in range(2)
    ]
    features = Features({"image": Image()} | dict.fromkeys(("question", "answer", "type"), Value("string")))
    Dataset.from_list(rows, features).to_parquet(folder / "chartqa.parquet")
    task = folder / "tasks" / "drawn_step.yaml"
    task.parent.mkdir()
    task.write_text(
        f"include: {STOCK_TASKS}/unig2u/chartqa100/chartqa100_visual_cot.yaml\n"
        f"task: drawn_step\ndataset_kwargs: {{data_files: {{train: {folder / 'chartqa.parquet'}}}}}\n"
    )
    command = [sys.executable, "-m", "lmms_eval", "--model", "deem", "--batch_size", "2", "--force_simple"]
    model_args = f"pretrained={folder / 'deem'},diffusion_model={folder / 'diffusion_model'},steps=2"
    command += ["--model_args", model_args]
    command += ["--tasks", "drawn_step", "--include_path", str(task.parent), "--log_samples"]
    command += ["--output_path", str(folder / "drawn")]

    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)

    assert list((folder / "drawn").rglob("*_results.json")), done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(next((folder / "drawn").rglob("*_results.json")).read_text())
    assert results["results"]["drawn_step"]["relaxed_overall,none"] == 0
    assert len(rows_of(folder / "drawn", "drawn_step")) == 2
