"""The training job: what is requested, what the SDK makes of it, and what happens inside the container."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.helpers import ROOT


def load(name: str) -> Any:
    found = importlib.util.spec_from_file_location(name, ROOT / "sagemaker" / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


launcher = load("launch_training_job")
entry = load("job_entry")

ROLE = "arn:aws:iam::123456789012:role/SageMaker"
WANTED = ["--data", "s3://bucket/data/victorian", "--output", "s3://bucket/runs", "--role", ROLE, "--region", "us-east-1"]  # fmt: skip


def dry(capsys: Any, *more: str) -> dict[str, Any]:
    assert launcher.main([*WANTED, "--dry-run", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_request_is_printed_offline(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    asked = dry(capsys, "--instances", "2", "--spot", "--max-hours", "10")
    assert asked["ResourceConfig"] == {"InstanceType": "ml.p4d.24xlarge", "InstanceCount": 2, "VolumeSizeInGB": 200}
    channel = asked["InputDataConfig"][0]
    assert channel["InputMode"] == "FastFile"
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == "s3://bucket/data/victorian"
    assert asked["StoppingCondition"] == {"MaxRuntimeInSeconds": 36_000, "MaxWaitTimeInSeconds": 72_000}
    assert asked["EnableManagedSpotTraining"] is True
    assert asked["CheckpointConfig"] == {
        "S3Uri": "s3://bucket/runs/victorian/checkpoints",
        "LocalPath": "/opt/ml/checkpoints",
    }
    assert asked["HyperParameters"]["flags"] == "--train.max-minutes 590"
    assert "us-east-1" in asked["AlgorithmSpecification"]["TrainingImage"]


def test_faults_are_all_named(capsys: Any) -> None:
    assert launcher.main(["--flags", "--train.lr '1'", "--max-wait-hours", "3"]) == 2
    said = capsys.readouterr().err
    assert all(flag in said for flag in ("--data", "--output", "--role", "--flags", "--max-wait-hours"))
    assert launcher.main([*WANTED, "--spot", "--max-hours", "5", "--max-wait-hours", "2"]) == 2


def test_metric_patterns_match_what_training_prints(capsys: Any) -> None:
    runlog = pytest.importorskip("runlog")
    values = {
        "step": 120, "tokens": 62914560, "train_loss": 4.25, "val_loss": 4.5, "val_bpb": 1.25, "lr": 1e-4,
        "grad_norm": 0.5, "tokens_per_s": 31234.5, "mfu": 0.25, "elapsed_s": 3.0,
    }  # fmt: skip
    line = runlog.line(values)
    found = {item["Name"]: item["Regex"] for item in dry(capsys)["AlgorithmSpecification"]["MetricDefinitions"]}
    assert len(found) <= 40
    for name, pattern in found.items():
        match = re.search(pattern, line)
        assert match and float(match[1]) == pytest.approx(values[name], rel=1e-3), name


def test_names_that_would_hide_the_sdk_are_absent() -> None:
    names = {path.stem for path in (ROOT / "sagemaker").glob("*.py")}
    taken = {"__init__", "train", "serve", "core", "mlops", "lineage", "ai_registry", "sagemaker", "boto3", "torch"}
    assert not names & (taken | set(sys.stdlib_module_names))
    assert not list((ROOT / "tests" / "aws").glob("__init__.py"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = Path(os.environ["VLG_TORCH_BIN"], "python") if "VLG_TORCH_BIN" in os.environ else sys.executable
    if python == sys.executable:
        pytest.importorskip("torch", reason="training needs torch")
    folder = tmp_path_factory.mktemp("shards")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"The fog of chapter {n} lay over the river and the town. " * 8 for n in range(60)))
    command = [python, ROOT / "prepare_data.py", "--input", text, "--out", folder / "data"]
    command += ["--tokenizer", "char", "--val-fraction", "0.2"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder / "data"


TINY = (
    "--model.n-layer 1 --model.n-head 2 --model.n-embd 16 --model.block-size 16 --train.batch-size 4 "
    "--train.warmup-steps 2 --train.log-interval 2 --train.eval-interval 5 --train.checkpoint-interval 5 "
    "--train.schedule constant --train.sample-interval 0 --train.device cpu --train.lr 1e-3"
)


@pytest.fixture
def job(tmp_path: Path, shards: Path) -> dict[str, str]:
    """The environment of a job's container, with its folders in a temporary place."""
    return {
        "SM_CHANNEL_TRAINING": str(shards),
        "SM_MODEL_DIR": str(tmp_path / "model"),
        "VLG_ML": str(tmp_path / "ml"),
        "VLG_SCRATCH": str(tmp_path / "scratch"),
        "VLG_RUN": "tiny",
        "TRAINING_JOB_NAME": "first",
    }


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_artifact_out_of_a_checkpoint_is_a_model_folder(tmp_path: Path) -> None:
    last = tmp_path / "run" / "last"
    last.mkdir(parents=True)
    for name in (
        "config.json",
        "model.safetensors",
        "training_state.safetensors",
        "training_state.json",
        "checksums.json",
    ):
        (last / name).write_text("{}")
    entry.keep_model(tmp_path / "run", tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_a_job_trains_resumes_and_leaves_a_model(job: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "ml" / "checkpoints" / "tiny"

    def train(flags: str) -> None:
        assert entry.main(["--preset", "starter", "--flags", f"{TINY} {flags}"], job) == 0

    train("--train.max-steps 10")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "model" / "training_state.safetensors").exists()
    assert (run / "tensorboard").resolve() == tmp_path / "ml" / "output" / "tensorboard"
    job["TRAINING_JOB_NAME"] = "second"
    train("--train.max-steps 20")
    steps = [row["step"] for row in rows(run) if "train_loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 20
    whole = {**job, "TRAINING_JOB_NAME": "whole", "VLG_RUN": "whole"}
    assert entry.main(["--preset", "starter", "--flags", f"{TINY} --train.max-steps 20"], whole) == 0
    weights = "last/model.safetensors"
    assert (run / weights).read_bytes() == (run.parent / "whole" / weights).read_bytes()


def test_a_checkpoint_that_was_under_way_is_passed_over(job: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "ml" / "checkpoints" / "tiny"
    words = ["--preset", "starter", "--flags", f"{TINY} --train.max-steps 15"]
    assert entry.main(words, job) == 0
    kept = sorted(path.name for path in run.glob("last*"))
    assert len(kept) == 2 and "last" in kept
    with (run / "last" / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"torn")
    assert entry.sound_checkpoints(run) == 1
    assert not (run / "last").exists()
    job["TRAINING_JOB_NAME"] = "second"
    assert entry.main(words, job) == 0
    assert (run / "last").is_dir()


def test_without_any_whole_checkpoint_the_job_starts_over(job: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "ml" / "checkpoints" / "tiny"
    (run / "last").mkdir(parents=True)
    (run / "last" / "config.json").write_text("{}")
    (run / "config.toml").write_text("broken")
    assert entry.main(["--preset", "starter", "--flags", f"{TINY} --train.max-steps 5"], job) == 0
    assert rows(run)[-1]["step"] == 5


def test_flags_of_the_job() -> None:
    made = entry.training_flags(
        ["--preset", "victorian", "--flags", "--train.lr 1e-4"], Path("/data"), Path("/run"), True
    )
    assert made == [
        "--preset", "victorian", "--data", "/data", "--out", "/run",
        "--train.lr", "1e-4", "--train.keep-last", "2", "--resume",
    ]  # fmt: skip


def has_sdk() -> bool:
    """Whether the SDK itself is there: `import sagemaker` alone would find this repository's folder."""
    try:
        return importlib.util.find_spec("sagemaker.core") is not None
    except ImportError:
        return False


needs_sdk = pytest.mark.skipif(
    not has_sdk(), reason="sagemaker.core is missing: pip install -r sagemaker/requirements.txt"
)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = pytest.importorskip("moto.server", reason="needs moto[server]: pip install -r requirements-aws.txt")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def launched(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[dict[str, Any], Any]:
    """A job started by the SDK against moto: the request it sent, and an S3 client to see what it uploaded."""
    import boto3
    from botocore.client import BaseClient

    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    settings = tmp_path / "sdk.yaml"
    settings.write_text("SchemaVersion: '1.0'\nSageMaker: {PythonSDK: {Modules: {TelemetryOptOut: true}}}\n")
    monkeypatch.setenv("SAGEMAKER_USER_CONFIG_OVERRIDE", str(settings))
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="bucket")
    sent: list[dict[str, Any]] = []
    call = BaseClient._make_api_call

    def recording(self: Any, name: str, parameters: dict[str, Any]) -> Any:
        if name == "CreateTrainingJob":
            sent.append(json.loads(json.dumps(parameters)))
        return call(self, name, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", recording)
    flags = ["--spot", "--max-hours", "2", "--instances", "2", "--flags", "--train.max-steps 20"]
    assert launcher.main([*WANTED, *flags]) == 0
    return sent[0], s3


@needs_sdk
def test_the_sdk_sends_what_the_dry_run_prints(launched: Any, capsys: Any) -> None:
    sent, _ = launched
    capsys.readouterr()
    asked = dry(capsys, "--spot", "--max-hours", "2", "--instances", "2", "--flags", "--train.max-steps 20")
    asked.pop("added by the SDK")
    for name in ("RoleArn", "CheckpointConfig", "TensorBoardOutputConfig", "StoppingCondition",
                 "EnableManagedSpotTraining"):  # fmt: skip
        assert sent[name] == asked[name], name
    assert sent["OutputDataConfig"]["S3OutputPath"] == asked["OutputDataConfig"]["S3OutputPath"]
    for name, value in asked["ResourceConfig"].items():
        assert sent["ResourceConfig"][name] == value
    for name, value in asked["Environment"].items():
        assert sent["Environment"][name] == value
    channels = {channel["ChannelName"]: channel for channel in sent["InputDataConfig"]}
    assert channels["training"]["InputMode"] == "FastFile"
    assert channels["training"]["DataSource"] == asked["InputDataConfig"][0]["DataSource"]
    assert {"code", "sm_drivers"} <= set(channels)
    assert sent["AlgorithmSpecification"]["TrainingImage"] == asked["AlgorithmSpecification"]["TrainingImage"]
    assert sent["AlgorithmSpecification"]["MetricDefinitions"] == asked["AlgorithmSpecification"]["MetricDefinitions"]
    assert sent["HyperParameters"]["preset"].strip('"') == "victorian"
    assert "--train.max-steps 20" in sent["HyperParameters"]["flags"]
    assert {"Key": "project", "Value": "victorian-literature-generator"} in sent["Tags"]


def fetched(s3: Any, uri: str, target: Path) -> Path:
    bucket, prefix = uri.removeprefix("s3://").split("/", 1)
    for item in s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", []):
        path = target / item["Key"][len(prefix) :].lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(bucket, item["Key"], str(path))
    return target


@needs_sdk
def test_the_code_that_goes_up_is_the_repository_without_its_data(launched: Any, tmp_path: Path) -> None:
    sent, s3 = launched
    channels = {channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in sent["InputDataConfig"]}  # fmt: skip
    code = fetched(s3, channels["code"], tmp_path / "code")
    packed = list(code.rglob("*.tar.gz"))
    if packed:
        shutil.unpack_archive(packed[0], code)
    names = {path.relative_to(code).as_posix() for path in code.rglob("*") if path.is_file()}
    assert {"train.py", "config.py", "presets/victorian.toml", "sagemaker/job_entry.py"} <= names
    assert not any(name.split("/")[0] in ("tests", ".git", "data", "runs") for name in names)


@needs_sdk
def test_the_sdks_start_script_runs_our_source(launched: Any, shards: Path, tmp_path: Path) -> None:
    """The container's own command, in a mount namespace with an empty /opt/ml, with this machine's torchrun."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root and unshare: the start script's folders lie under /opt/ml")
    torchrun = os.environ.get("VLG_TORCH_BIN", "")
    if not torchrun:
        pytest.skip("set VLG_TORCH_BIN to the folder with a python and torchrun that have torch")
    sent, s3 = launched
    ml = tmp_path / "ml"
    for channel in sent["InputDataConfig"]:
        uri, name = channel["DataSource"]["S3DataSource"]["S3Uri"], channel["ChannelName"]
        if name == "training":
            shutil.copytree(shards, ml / "input" / "data" / name)
        else:
            fetched(s3, uri, ml / "input" / "data" / name)
    config = ml / "input" / "config"
    config.mkdir(parents=True)
    hosts = {"current_host": "algo-1", "hosts": ["algo-1"], "current_instance_type": "ml.m5.large", "network_interface_name": "lo"}  # fmt: skip
    (config / "resourceconfig.json").write_text(json.dumps(hosts))
    parameters = {**sent["HyperParameters"], "preset": "starter", "flags": f"{TINY} --train.max-steps 10"}
    (config / "hyperparameters.json").write_text(json.dumps(parameters))
    listed = {c["ChannelName"]: {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated"} for c in sent["InputDataConfig"]}  # fmt: skip
    (config / "inputdataconfig.json").write_text(json.dumps(listed))
    words = sent["AlgorithmSpecification"]["ContainerEntrypoint"] + sent["AlgorithmSpecification"].get("ContainerArguments", [])  # fmt: skip
    binds = f'mkdir -p /opt/ml && mount --bind {ml} /opt/ml && exec "$@"'
    skip = tmp_path / "bin"
    skip.mkdir()
    (skip / "pip").write_text("#!/bin/sh\nexit 0\n")
    (skip / "pip").chmod(0o755)
    variables = {
        "PATH": f"{skip}:{torchrun}:{os.environ['PATH']}", "TRAINING_JOB_NAME": "bootstrap", "OMP_NUM_THREADS": "1",
        "HOME": str(tmp_path), "AWS_REGION": "us-east-1", "VLG_SCRATCH": str(tmp_path / "scratch"), **sent["Environment"],
    }  # fmt: skip
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", binds, "sh", *words], capture_output=True, text=True, env=variables, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (ml / "model" / "model.safetensors").is_file()
    assert (ml / "checkpoints" / "victorian" / "last").is_dir()
    assert "train_loss=" in done.stdout + done.stderr
