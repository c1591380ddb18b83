"""Inside a SageMaker training job: gives `train.py` its data, a run folder that outlives the machine, and its flags.

    torchrun --nproc_per_node=8 sagemaker/job_entry.py --preset victorian --flags "--train.max-steps 2000"

The run folder lies in /opt/ml/checkpoints, which SageMaker copies to S3 as it changes and brings back before the next
job. The copy is not atomic, so a checkpoint that was under way is found damaged by its checksums and the one before it
is used. The best model becomes the job's artifact.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

READY = ".ready"


def training_flags(words: Sequence[str], data: Path, run: Path, resume: bool) -> list[str]:
    """The command line of `train.py`: from the job's hyperparameters (`--key value` pairs) and its folders."""
    given = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    flags = ["--preset", given.get("preset", "victorian"), "--data", str(data), "--out", str(run)]
    more = shlex.split(given.get("flags", ""))
    if not any("keep-last" in word or "keep_last" in word for word in more):
        more += ["--train.keep-last", "2"]
    return flags + more + (["--resume"] if resume else [])


def sound_checkpoints(run: Path) -> int:
    """Remove checkpoints that do not match their checksums; how many are left."""
    from storage import atomic

    left = 0
    for folder in sorted(run.glob("last*")):
        if folder.is_dir() and (not (folder / atomic.SUMS).is_file() or atomic.faults(folder)):
            print(f"checkpoint {folder.name} is incomplete: removed", flush=True)
            shutil.rmtree(folder)
        elif folder.is_dir():
            left += 1
    return left


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


def prepare(environment: Mapping[str, str], run: Path, scratch: Path) -> tuple[Path, bool]:
    """Data folder and whether there is something to resume; done once on each machine, the other processes wait."""
    channel = Path(environment["SM_CHANNEL_TRAINING"])
    job = environment.get("TRAINING_JOB_NAME", "job")
    flag = scratch / f"{job}{READY}"
    if int(environment.get("LOCAL_RANK", "0")) == 0:
        data = local_copy(channel, scratch / "data")
        resume = sound_checkpoints(run) > 0
        if not resume and run.exists():
            shutil.rmtree(run)
        flag.write_text(f"{data}\n{int(resume)}")
    while not flag.exists():
        time.sleep(0.5)
    while len(lines := flag.read_text().split("\n")) < 2:
        time.sleep(0.1)
    return Path(lines[0]), lines[1] == "1"


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
    """The best model, or the last where there is none, as the job's artifact."""
    from checkpoint import TRAINING_FILES

    folders = [run / "best", *sorted(run.glob("last*"), reverse=True)]
    best = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if best is None:
        print("the run has no model yet: the job leaves no artifact", flush=True)
        return
    artifact.mkdir(parents=True, exist_ok=True)
    for path in best.iterdir():
        if path.is_file() and path.name not in TRAINING_FILES:
            shutil.copy2(path, artifact / path.name)
    print(f"artifact: {best.name} of {run.name}", flush=True)


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    import train

    words = list(sys.argv[1:] if argv is None else argv)
    at = environment or os.environ
    ml = Path(at.get("VLG_ML", "/opt/ml"))
    run = ml / "checkpoints" / at.get("VLG_RUN", "run")
    scratch = Path(at.get("VLG_SCRATCH", "/tmp/victorian"))
    scratch.mkdir(parents=True, exist_ok=True)
    data, resume = prepare(at, run, scratch)
    first = int(at.get("RANK", "0")) == 0
    if first:
        tensorboard_to(run, ml / "output" / "tensorboard")
    code = train.main(training_flags(words, data, run, resume))
    if first:
        keep_model(run, Path(at.get("SM_MODEL_DIR", ml / "model")))
    return code


if __name__ == "__main__":
    sys.exit(main())
