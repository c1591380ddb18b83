"""Inside a SageMaker training job: gives `train.py` its data, a run folder that outlives the machine, and its flags.

    exec python3 sagemaker/job_entry.py        # what the job's start script runs; becomes torchrun, which runs this file again

The run folder lies on the machine. Its checkpoints are copied to /opt/ml/checkpoints, which SageMaker copies to S3 and
brings back before the next job (see checkpoint_mirror.py). The best model becomes the job's artifact.

SageMaker stops a job with SIGTERM to the container's first process, and the spot service gives two minutes after it. The
SDK's own launchers leave a shell there, which passes nothing on
(https://github.com/aws/sagemaker-training-toolkit/issues/173); replaced by torchrun, which passes it to all processes, the
job saves a checkpoint. torchrun gives them 30 seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from checkpoint_mirror import Facts, Mirror, in_s3  # noqa: E402

READY = ".ready"
MINUTES = re.compile(r"--train\.max[-_]minutes[= ]\s*(\S+)")


def launch(environment: Mapping[str, str]) -> None:
    """Become torchrun, which runs this file once for each GPU of each machine."""
    given = json.loads(environment.get("SM_HPS", "{}"))
    hosts, kind = int(environment.get("SM_HOST_COUNT", "1")), environment.get("SM_CURRENT_INSTANCE_TYPE", "")
    processes = int(environment.get("SM_NUM_GPUS", "0")) or 1
    words = ["torchrun", f"--nnodes={hosts}", f"--nproc_per_node={processes}"]
    if hosts > 1:
        words += [f"--master_addr={environment['SM_MASTER_ADDR']}", f"--master_port={environment['SM_MASTER_PORT']}"]
        words += [f"--node_rank={environment['SM_CURRENT_HOST_RANK']}"]
    words += [str(Path(__file__).resolve())]
    for name in ("preset", "flags"):
        if given.get(name):
            words += [f"--{name}", str(given[name])]
    network = {"NCCL_SOCKET_IFNAME": environment.get("SM_NETWORK_INTERFACE_NAME", "eth0")}
    if kind.startswith(("ml.p4", "ml.p5")):  # machines with EFA, set as the SDK's torchrun driver sets them
        network |= {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1", "RDMAV_FORK_SAFE": "1", "NCCL_PROTO": "simple"}
    print("starting", shlex.join(words), flush=True)
    os.execvpe(words[0], words, {**environment, **network})


def training_flags(words: Sequence[str], data: Path, run: Path, restored: Facts | None) -> list[str]:
    """The command line of `train.py`: from the job's hyperparameters (`--key value` pairs) and its folders.

    --train.max-minutes counts the minutes of a run, and a job's limit those of the job: what was trained before is added.
    """
    given = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    flags = ["--preset", given.get("preset", "victorian"), "--data", str(data), "--out", str(run)]
    spent = restored["elapsed_s"] / 60 if restored else 0.0
    more = MINUTES.sub(lambda found: f"--train.max-minutes {float(found[1]) + spent:g}", given.get("flags", ""))
    return flags + shlex.split(more) + (["--resume"] if restored else [])


def local_copy(channel: Path, target: Path) -> Path:
    """The shards on the machine's own disk: one reader in order, because training reads at random places.

    Leaves them where they are when the disk is too small.
    """
    size = sum(path.stat().st_size for path in channel.rglob("*") if path.is_file())
    target.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(target.parent).free < 1.2 * size:
        print(f"the disk is too small for a copy of {size / 1e9:.1f} GB: reading from {channel}", flush=True)
        return channel
    began = time.monotonic()
    shutil.copytree(channel, target, dirs_exist_ok=True)
    print(f"copied {size / 1e9:.1f} GB in {time.monotonic() - began:.0f} s", flush=True)
    return target


def prepare(environment: Mapping[str, str], mirror: Mirror, run: Path, scratch: Path) -> tuple[Path, Facts | None]:
    """Data folder and what was restored; done once on each machine, the other processes wait."""
    channel = Path(environment["SM_CHANNEL_TRAINING"])
    job = environment.get("TRAINING_JOB_NAME", "job")
    flag = scratch / f"{job}{READY}"
    if int(environment.get("LOCAL_RANK", "0")) == 0:
        data = local_copy(channel, scratch / "data")
        restored = mirror.restore(run)
        if restored is None:
            shutil.rmtree(run, ignore_errors=True)
        draft = flag.with_suffix(".draft")
        draft.write_text(json.dumps([str(data), restored]))
        draft.rename(flag)
    while not flag.exists():
        time.sleep(0.5)
    found, restored = json.loads(flag.read_text())
    return Path(found), restored


def tensorboard_to(run: Path, target: Path) -> None:
    """Write TensorBoard's files where SageMaker picks them up."""
    target.mkdir(parents=True, exist_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    link = run / "tensorboard"
    if link.is_symlink():
        return
    if link.is_dir():
        shutil.copytree(link, target, dirs_exist_ok=True)
        shutil.rmtree(link)
    link.symlink_to(target)


def keep_model(run: Path, artifact: Path) -> None:
    """The best model that can be read, or the last checkpoint where there is none, as the job's artifact."""
    from checkpoint import TRAINING_FILES

    folders = [run / "best", *sorted(run.glob("last*"), reverse=True)]
    best = next((folder for folder in folders if is_readable(folder)), None)
    if best is None:
        print("the run has no model yet: the job leaves no artifact", flush=True)
        return
    artifact.mkdir(parents=True, exist_ok=True)
    for path in best.iterdir():
        if path.is_file() and path.name not in TRAINING_FILES:
            shutil.copy2(path, artifact / path.name)
    print(f"artifact: {best.name} of {run.name}", flush=True)


def is_readable(folder: Path) -> bool:
    """Whether a model folder can be loaded with all its weights."""
    from checkpoint import load_model

    if not folder.is_dir():
        return False
    try:
        load_model(folder)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{folder.name} cannot be read: {error}", flush=True)
        return False
    return True


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    import train

    words = list(sys.argv[1:] if argv is None else argv)
    at = environment or os.environ
    ml = Path(at.get("VLG_ML", "/opt/ml"))
    name = at.get("VLG_RUN", "run")
    run, scratch = ml / "run" / name, Path(at.get("VLG_SCRATCH", "/tmp/victorian"))
    scratch.mkdir(parents=True, exist_ok=True)
    copies = at.get("VLG_CHECKPOINTS", "")
    mirror = Mirror(ml / "checkpoints" / name, ml / "drafts", *([in_s3(f"{copies}/{name}")] if copies else []))
    data, restored = prepare(at, mirror, run, scratch)
    first = int(at.get("RANK", "0")) == 0
    if first:
        tensorboard_to(run, ml / "output" / "tensorboard")
    with mirror.following(run) if first else contextlib.nullcontext():
        code = train.main(training_flags(words, data, run, restored))
    if first:
        keep_model(run, Path(at.get("SM_MODEL_DIR", ml / "model")))
        if code:  # what DescribeTrainingJob gives as the FailureReason
            (ml / "output").mkdir(exist_ok=True)
            (ml / "output" / "failure").write_text(f"train.py ended with code {code}: see the job's log")
    return code


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(print(__doc__))
    if "RANK" not in os.environ:
        launch(os.environ)
    sys.exit(main())
