"""The training job: what is requested, what the SDK makes of it, and what happens inside the container."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aws_fakes import wait_for

from support.helpers import ROOT
from support.tiny_models import random_model, save, shape, tiny_tokenizer


def load(name: str) -> Any:
    found = importlib.util.spec_from_file_location(name, ROOT / "sagemaker" / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


launcher = load("launch_training_job")
entry = load("job_entry")
mirror = sys.modules["checkpoint_mirror"]

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
    last = save(tmp_path / "run" / "last", random_model(shape(tiny_tokenizer())), tiny_tokenizer())
    for name in (
        "training_state.safetensors",
        "training_state.json",
        "checksums.json",
    ):
        (last / name).write_text("{}")
    torn = save(tmp_path / "run" / "best", random_model(shape(tiny_tokenizer())), tiny_tokenizer())
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-100])
    entry.keep_model(tmp_path / "run", tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors"} <= names and not any("training" in name for name in names)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (last / "model.safetensors").read_bytes()


def test_a_job_trains_resumes_and_leaves_a_model(job: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "ml" / "run" / "tiny"

    def train(flags: str) -> None:
        assert entry.main(["--preset", "starter", "--flags", f"{TINY} {flags}"], job) == 0

    train("--train.max-steps 10")
    assert (run / "tensorboard").resolve() == tmp_path / "ml" / "output" / "tensorboard"
    assert {path.name for path in mirrored(tmp_path)} >= {"step-000010", "best-000010"}
    shutil.rmtree(run)  # the next machine has only what SageMaker brings back
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "model" / "training_state.safetensors").exists()
    job["TRAINING_JOB_NAME"] = "second"
    train("--train.max-steps 20")
    steps = [row["step"] for row in rows(run) if "train_loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 20
    whole = {**job, "TRAINING_JOB_NAME": "whole", "VLG_RUN": "whole"}
    assert entry.main(["--preset", "starter", "--flags", f"{TINY} --train.max-steps 20"], whole) == 0
    weights = "last/model.safetensors"
    assert (run / weights).read_bytes() == (run.parent / "whole" / weights).read_bytes()


def mirrored(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "ml" / "checkpoints" / "tiny").iterdir())


def test_a_checkpoint_that_arrived_damaged_is_passed_over(job: dict[str, str], tmp_path: Path) -> None:
    words = ["--preset", "starter", "--flags", f"{TINY} --train.max-steps 15"]
    assert entry.main(words, job) == 0
    newest = tmp_path / "ml" / "checkpoints" / "tiny" / "step-000015"
    shutil.copytree(newest, newest.with_name("step-000020"))
    with (newest.with_name("step-000020") / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"torn")
    (newest.with_name("step-000025")).mkdir()
    facts = mirror.Mirror(newest.parent, tmp_path / "drafts").restore(tmp_path / "restored")
    assert facts["step"] == 15 and facts["max_steps"] == 15
    assert (tmp_path / "restored" / "last" / "model.safetensors").is_file()
    assert (tmp_path / "restored" / "config.toml").is_file() and (tmp_path / "restored" / "best").is_dir()


def test_without_any_whole_checkpoint_the_job_starts_over(job: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "ml" / "checkpoints" / "tiny" / "step-000005").mkdir(parents=True)
    (tmp_path / "ml" / "checkpoints" / "tiny" / "step-000005" / "config.json").write_text("{}")
    run = tmp_path / "ml" / "run" / "tiny"
    run.mkdir(parents=True)
    (run / "config.toml").write_text("broken")
    assert entry.main(["--preset", "starter", "--flags", f"{TINY} --train.max-steps 5"], job) == 0
    assert rows(run)[-1]["step"] == 5


def test_flags_of_the_job() -> None:
    words = ["--preset", "victorian", "--flags", "--train.lr 1e-4 --train.max-minutes 590"]
    flags = ["--preset", "victorian", "--data", "/data", "--out", "/run", "--train.lr", "1e-4", "--train.max-minutes"]
    assert entry.training_flags(words, Path("/data"), Path("/run"), None) == [*flags, "590"]
    made = entry.training_flags(words, Path("/data"), Path("/run"), {"elapsed_s": 600 * 60.0})
    assert made == [*flags, "1190", "--resume"], "the job's minutes come on top of those trained before"


class S3Mirror(mirror.Mirror):
    """Checkpoints of a machine whose folder is copied in random order, a file at a time; `there` is what has been copied.

    SageMaker's documentation promises no order (https://docs.aws.amazon.com/sagemaker/latest/dg/model-checkpoints.html). After
    each change on the machine some of the changes that are still to be copied are, removals as well.
    """

    def __init__(self, root: Path, chance: random.Random):
        super().__init__(root / "here", root / "drafts", self.is_whole)
        self.chance, self.safe = chance, False
        self.here: dict[str, bytes] = {}
        self.there: dict[str, bytes] = {}
        self.complete: dict[str, set[str]] = {}  # the files of each checkpoint that was written to its end

    def is_whole(self, name: str) -> bool:
        return name in self.complete and self.complete[name] <= set(self.there)

    def place(self, draft: Path, target: Path) -> None:
        self.here[str(target.relative_to(self.folder))] = draft.read_bytes()
        super().place(draft, target)
        if target.name == mirror.MARKER:
            self.complete[target.parent.name] = {name for name in self.here if name.startswith(target.parent.name)}
        self.copy(self.chance.randrange(4))

    def _prune(self, kind: str) -> None:
        super()._prune(kind)
        left = {path.name for path in self.folder.iterdir()}
        self.here = {name: body for name, body in self.here.items() if name.split("/")[0] in left}

    def copy(self, count: int) -> None:
        for _ in range(count):
            due = sorted(self.here.keys() ^ self.there.keys())
            if not due:
                return
            name = self.chance.choice(due)
            if name in self.here:
                self.there[name] = self.here[name]
            else:
                del self.there[name]
            found = any(self.is_whole(checkpoint) for checkpoint in self.complete)
            assert found or not self.safe, "a stop now would find no whole checkpoint"
            self.safe = self.safe or found

    def bring_back(self, folder: Path) -> Path:
        """What the next machine finds."""
        for name, body in self.there.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(body)
        return folder


def simulate(root: Path, seed: int, stop: int = 60) -> S3Mirror:
    """A run that saves a checkpoint every ten steps up to `stop`; its files are tiny, and named as those of a real one."""
    from storage import atomic

    machine, run = S3Mirror(root, random.Random(seed)), root / "run"
    run.mkdir(parents=True)
    (run / "config.toml").write_text("[train]\nmax_steps = 60\n")
    for step in range(10, stop + 1, 10):
        with atomic.atomic_folder(run / "last") as draft:
            (draft / "config.json").write_text(f"weights {step}")
            state = {"step": step, "progress": {"elapsed_s": step * 60.0}}
            (draft / "training_state.json").write_text(json.dumps(state))
            atomic.write_sums(draft, step)
        machine.save(run)
        machine.copy(machine.chance.randrange(6))
    return machine


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: thousands of small files are removed again."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("first", "count"), [(0, 100), *(pytest.param(n, 300, marks=pytest.mark.slow) for n in (100, 400, 700))]
)
def test_a_whole_checkpoint_is_found_whenever_the_machine_is_taken(
    memory: Path, first: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand orders, of which each is looked at after every single copy, and restored from at its end."""
    monkeypatch.setattr("os.fsync", lambda number: None)
    for seed in range(first, first + count):
        root = memory / str(seed)
        machine = simulate(root, seed, stop=40)
        facts = mirror.Mirror(machine.bring_back(root / "back"), root).restore(root / "restored")
        newest = max((name for name in machine.complete if machine.is_whole(name)), default="")
        assert (facts is None) == (not newest) and (facts is None or facts["step"] == int(newest[5:]))
        assert facts is not None or not machine.safe
        shutil.rmtree(root)


def test_what_is_left_is_said_before_a_job_is_paid_for(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    from config import ConfigError
    from storage import s3

    for name, value in {"ENDPOINT_URL": server, "ACCESS_KEY_ID": "t", "SECRET_ACCESS_KEY": "t", "DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    with contextlib.suppress(s3.client().exceptions.BucketAlreadyOwnedByYou):
        s3.client().create_bucket(Bucket="left")
    flags = launcher.Flags(name="tiny", output="s3://left/runs", data="s3://left/data", role=ROLE, max_hours=2)
    minutes = launcher.job_minutes(flags)
    assert "starts at step 0 and has 110 minutes" in launcher.remaining(flags, minutes)
    machine = simulate(tmp_path, 1)
    machine.copy(1000)
    s3.upload_folder(machine.bring_back(tmp_path / "back"), "s3://left/runs/tiny/checkpoints/tiny")
    with pytest.raises(ConfigError, match="step 60 of 60: a job would train no step"):
        launcher.remaining(flags, minutes)
    more = flags.model_copy(update={"flags": "--train.max-steps 90 --train.max-minutes 30"})
    assert launcher.remaining(more, launcher.job_minutes(more)) == (
        "run tiny: at step 60 of 90 after 60 minutes; this job has 30 minutes more"
    )


@pytest.mark.slow
def test_sigterm_reaches_the_trainer_through_the_jobs_first_process(job: dict[str, str], tmp_path: Path) -> None:
    """SageMaker sends SIGTERM to the container's first process (docs: "How Amazon SageMaker Runs Your Training Image"); the
    SDK's script runs `eval "$CMD"` (sagemaker.train.templates), in which `exec` puts torchrun into the shell's place."""
    flags = f"{TINY} --train.max-steps 1000000 --train.checkpoint-interval 0 --train.eval-interval 0"
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run --master_port 0 "$@"\n')
    torchrun.chmod(0o755)
    variables = {
        **os.environ,
        **job,
        "SM_HPS": json.dumps({"preset": "starter", "flags": flags}),
        "OMP_NUM_THREADS": "1",
    }
    variables["PATH"] = f"{torchrun.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = f"CMD='{launcher.COMMAND.replace('python3', sys.executable)}'\neval \"$CMD\""
    with (tmp_path / "log").open("w") as log:
        shell = subprocess.Popen(["bash", "-c", script + "\necho the shell goes on"], cwd=ROOT, env=variables, stdout=log, stderr=log, start_new_session=True)  # fmt: skip
    try:
        wait_for(lambda: "train_loss=" in (tmp_path / "log").read_text() or shell.poll() is not None, 120)
        shell.terminate()
        shell.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text()
    assert "stopped by SIGTERM" in said, said[-3000:]
    assert "the shell goes on" not in said
    assert any(mirror.marker(path) for path in mirrored(tmp_path)), "a checkpoint was saved and copied"


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
    assert list((ml / "checkpoints" / "victorian").glob("step-*/complete.json"))
    assert "train_loss=" in done.stdout + done.stderr
