"""The rows of the compatibility table: what is served, with which packages, and how load reaches it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROWS = Path(__file__).parent / "rows"


def plain_request(path):
    """A request of the models here that take JSON of their own."""
    return lambda seconds: (path, {"values": [1.5, 2.5], "seconds": seconds})


def plain_reading(answer):
    return answer["pid"], answer["revision"]


def tensor_request(seconds):
    inputs = [
        {"name": "values", "shape": [2], "datatype": "FP32", "data": [1.5, 2.5]},
        {"name": "seconds", "shape": [1], "datatype": "FP32", "data": [seconds]},
    ]
    return "/v2/models/sum/infer", {"inputs": inputs}


def tensor_reading(answer):
    outputs = {output["name"]: output["data"][0] for output in answer["outputs"]}
    return outputs["pid"], str(outputs["revision"])


def mlflow_request(seconds):
    return "/invocations", {"dataframe_split": {"columns": ["values", "seconds"], "data": [[1.5, seconds]]}}


# The model pauses before each word.
PAUSE_SECONDS = 0.02


def chat_request(seconds):
    words = " word" * round(seconds / PAUSE_SECONDS)
    return "/v1/chat/completions", {"model": "echo", "messages": [{"role": "user", "content": f"say{words}"}]}


def chat_reading(answer):
    text = answer["choices"][0]["message"]["content"]
    pid, revision = re.match(r"pid=(\d+) revision=(\w+)", text).groups()
    return int(pid), revision


@dataclass(frozen=True)
class Row:
    """A server. `request` makes the path and body of one that takes so many seconds; `reading` finds in its answer the
    process that computed it and the value of the variable REVISION there."""

    name: str
    title: str
    environment: str
    client: str
    request: Callable
    reading: Callable = plain_reading
    # Which folder of rows/ has the model, if not the one of this name.
    folder: str | None = None
    # A program in it that writes the model's files, run once before the start.
    prepare: str | None = None
    # A program that must be on PATH besides.
    needs: str | None = None
    # The status of requests in flight on a killed process: 502, unless the server keeps the connection open.
    lost_as: int = 502
    # What holds for this server alone, for README.md.
    note: str | None = None

    def model(self):
        return ROWS / (self.folder or self.name)

    def document(self):
        return ROWS / self.name / "document.yaml"

    def script(self):
        return self.model() / "client.py"


LITSERVE_LOSES = (
    "A request whose worker has died is never answered (`findings/litserve-leaves-requests-unanswered.sh`), so it ends at the"
    " time-out, as 408. Served with `restart_workers=True`; without, the entire server ends half a minute later. Its temporary"
    " files stay when it is ended, hence `TMPDIR`."
)

ALL = [
    Row("mlflow", "MLflow", "mlflow", "requests", mlflow_request,
        reading=lambda answer: plain_reading(answer["predictions"]), prepare="make.py"),
    Row("mlserver", "MLServer", "mlserver", "triton", tensor_request, reading=tensor_reading,
        note="Served without its parallel worker (`MLSERVER_PARALLEL_WORKERS: \"0\"`): after the death of that process MLServer"
        " 1.7.1 answers 500 for seconds, and says that it is ready (`findings/mlserver-ready-without-workers.sh`). It has"
        " no binary tensors; KServe has."),
    Row("kserve", "KServe", "kserve", "triton", tensor_request, reading=tensor_reading),
    Row("uvicorn", "FastAPI, uvicorn", "uvicorn", "requests", plain_request("/score")),
    Row("uvicorn-workers", "FastAPI, uvicorn with 2 workers", "uvicorn", "requests", plain_request("/score"),
        folder="uvicorn"),
    Row("gunicorn", "WSGI, gunicorn with 2 workers", "gunicorn", "requests", plain_request("/predict")),
    Row("litserve", "LitServe", "litserve", "requests", plain_request("/predict"), lost_as=408, note=LITSERVE_LOSES),
    Row("openai", "OpenAI-compatible (LitServe's OpenAISpec)", "litserve", "openai", chat_request,
        reading=chat_reading, lost_as=504, note=LITSERVE_LOSES.replace("408", "504")),
    Row("bentoml", "BentoML", "bentoml", "requests", plain_request("/predict")),
    Row("azureml", "Azure ML inference server", "azureml", "requests", plain_request("/score")),
    Row("torchserve", "TorchServe", "torchserve", "requests", plain_request("/predictions/sum"), prepare="make.py",
        needs="java", lost_as=424,
        note="A request whose worker has died is answered by TorchServe itself, with 507, which is 424 as any error of a model."),
]  # fmt: skip
