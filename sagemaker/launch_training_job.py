"""Train on SageMaker: the repository as it is, `torchrun` on every GPU, data and results in S3.

    python sagemaker/launch_training_job.py --data s3://MY-BUCKET/data/victorian --output s3://MY-BUCKET/runs \\
        --role arn:aws:iam::ACCOUNT:role/SageMaker --dry-run
    python sagemaker/launch_training_job.py … --instance-type ml.g5.xlarge --preset story-small --max-hours 3
    python sagemaker/launch_training_job.py … --name victorian-a --spot      # the same command again resumes exactly

The job runs `sagemaker/job_entry.py`, which passes the data to `train.py`, keeps the run folder where SageMaker copies it
to S3 and restores it from there, and leaves the best model as the job's artifact. A job of the same --name and --output
resumes from the newest complete checkpoint. Needs `pip install -r sagemaker/requirements.txt` (735 MB); --dry-run does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (HERE, ROOT):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from checkpoint_mirror import newest_in_s3  # noqa: E402

from cli import parse_flags, run_main  # noqa: E402
from config import ConfigError, FrozenSettings  # noqa: E402
from storage import s3  # noqa: E402

DLC = "763104351884.dkr.ecr.{region}.amazonaws.com/pytorch-training:2.10.0-gpu-py313"
COMMAND = "exec python3 sagemaker/job_entry.py"  # exec: SIGTERM reaches it, see there
REQUIREMENTS = "sagemaker/job-requirements.txt"
CHANNEL = "training"
LOG_GROUP = "/aws/sagemaker/TrainingJobs"
CHECKPOINTS, TENSORBOARD = "/opt/ml/checkpoints", "/opt/ml/output/tensorboard"
LEFT_OUT = [
    ".git", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".env",
    "data", "runs", "models", "build", "tests", "notebooks", "docs", "web",
]  # fmt: skip
MINUTES = re.compile(r"--train\.max[-_]minutes[= ]\s*([\d.]+)")
METRICS = ("step", "train_loss", "val_loss", "val_bpb", "lr", "grad_norm", "tokens_per_s", "mfu")
TAG = {"key": "project", "value": "victorian-literature-generator"}


class Flags(FrozenSettings):
    """A SageMaker training job."""

    name: str = Field("victorian", pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,39}$")
    """Name of the run; a job of the same name and output resumes it."""
    preset: str = "victorian"
    """Preset to train."""
    flags: str = ""
    """More flags for train.py, in one string: `--train.max-steps 2000 --train.lr 3e-4`."""
    data: str = ""
    """s3://BUCKET/FOLDER with the shards (prepare_data.py --s3-output)."""
    output: str = ""
    """s3://BUCKET/FOLDER for checkpoints, TensorBoard files and the model."""
    role: str = ""
    """ARN of the role that SageMaker assumes."""
    region: str = ""
    """AWS region; default: that of the AWS settings."""
    instance_type: str = "ml.p4d.24xlarge"
    """Machine; p4d.24xlarge has 8 A100."""
    instances: int = Field(1, ge=1, le=64)
    """Machines; torchrun joins them."""
    volume_gb: int = Field(200, ge=10, le=16384)
    """Disk size of machines without local storage."""
    input_mode: Literal["FastFile", "File"] = "FastFile"
    """FastFile starts at once and copies the shards in order; File waits for SageMaker's download."""
    max_hours: float = Field(24.0, gt=0.0, le=120.0)
    """Hours this job may run (SageMaker ends it then; train.py saves ten minutes earlier). A later job has its own."""
    spot: bool = False
    """Spare capacity: much cheaper, may be interrupted, resumes by itself."""
    max_wait_hours: float = Field(0.0, ge=0.0, le=240.0)
    """Hours in all, waiting for spare capacity included; default: twice --max-hours."""
    image: str = ""
    """Training image; default: AWS's PyTorch image. sagemaker/Dockerfile built with CUDA works as well."""
    kms_key: str = ""
    """KMS key that encrypts the machines' disks and the results; default: AWS's own keys."""
    subnets: str = ""
    """Subnets of a VPC, separated by commas, in which the machines run; needs --security-groups."""
    security_groups: str = ""
    """Security groups of the machines, separated by commas."""
    log_days: Literal[1, 3, 5, 7, 14, 30, 60, 90, 180, 365] = 30
    """Days that the account's log of training jobs is kept, where nobody has set it yet."""
    wait: bool = True
    """Follow the job's log to its end."""
    dry_run: bool = False
    """Print the whole request, and send nothing."""


def check(flags: Flags) -> None:
    """All errors of the flags in one ConfigError."""
    errors = []
    for name, wanted in (("data", "the shards"), ("output", "checkpoints and the model")):
        value = getattr(flags, name)
        if not s3.is_s3(value):
            errors.append(f"--{name} {value!r}: give s3://BUCKET/FOLDER for {wanted}")
    if not flags.role:
        errors.append("--role is missing: the ARN of a SageMaker execution role (docs/aws.md, step 4)")
    if "'" in flags.flags:
        errors.append("--flags must not contain single quotes: SageMaker's start script cannot carry them")
    if flags.max_wait_hours and not flags.spot:
        errors.append("--max-wait-hours goes with --spot: add it, or leave this flag out")
    if flags.spot and 0 < flags.max_wait_hours < flags.max_hours:
        errors.append(f"--max-wait-hours {flags.max_wait_hours:g} is below --max-hours {flags.max_hours:g}: raise it")
    if bool(flags.subnets) != bool(flags.security_groups):
        errors.append("--subnets and --security-groups belong together: give both, or none")
    if len(flags.flags) > 2400:
        errors.append("--flags is longer than SageMaker carries (2,500 characters): put the settings into a preset")
    if errors:
        raise ConfigError(errors)


def region_of(flags: Flags) -> str:
    region = flags.region or os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION")
    if not region and not flags.dry_run:
        import boto3

        region = boto3.session.Session().region_name
        if not region:
            raise ConfigError(["no AWS region: give --region, or set AWS_DEFAULT_REGION"])
    return region or "REGION"


def job_minutes(flags: Flags) -> int:
    """Minutes that one job trains: those given, or what its limit leaves beside the last evaluation and upload."""
    given = MINUTES.search(flags.flags)
    return round(float(given[1])) if given else max(1, round(flags.max_hours * 60) - 10)


def request(flags: Flags, region: str) -> dict[str, Any]:
    """The CreateTrainingJob request, but for what the SDK adds: the code's channels, the start script, a time stamp."""
    more = flags.flags if MINUTES.search(flags.flags) else f"{flags.flags} --train.max-minutes {job_minutes(flags)}"
    run = f"{s3.s3_url(flags.output)}/{flags.name}"
    stopping = {"MaxRuntimeInSeconds": round(flags.max_hours * 3600)}
    if flags.spot:
        stopping["MaxWaitTimeInSeconds"] = round((flags.max_wait_hours or 2 * flags.max_hours) * 3600)
    key: dict[str, Any] = {"KmsKeyId": flags.kms_key} if flags.kms_key else {}
    disk = {"VolumeKmsKeyId": flags.kms_key} if flags.kms_key else {}
    place: dict[str, Any] = {}
    if flags.subnets:
        groups = flags.security_groups.split(",")
        place["VpcConfig"] = {"Subnets": flags.subnets.split(","), "SecurityGroupIds": groups}
    source = {"S3DataType": "S3Prefix", "S3Uri": s3.s3_url(flags.data), "S3DataDistributionType": "FullyReplicated"}
    return {
        "AlgorithmSpecification": {
            "TrainingImage": flags.image or DLC.format(region=region),
            "MetricDefinitions": [{"Name": name, "Regex": rf"\b{name}=([-+0-9.eE]+)"} for name in METRICS],
        },
        "RoleArn": flags.role,
        "HyperParameters": {"preset": flags.preset, "flags": more.strip()},
        "InputDataConfig": [
            {"ChannelName": CHANNEL, "InputMode": flags.input_mode, "DataSource": {"S3DataSource": source}}
        ],
        "OutputDataConfig": {"S3OutputPath": f"{run}/artifacts", **key},
        "CheckpointConfig": {"S3Uri": f"{run}/checkpoints", "LocalPath": CHECKPOINTS},
        "TensorBoardOutputConfig": {"S3OutputPath": f"{run}/tensorboard", "LocalPath": TENSORBOARD},
        "ResourceConfig": {
            "InstanceType": flags.instance_type,
            "InstanceCount": flags.instances,
            "VolumeSizeInGB": flags.volume_gb,
            **disk,
        },
        **place,
        "StoppingCondition": stopping,
        "EnableManagedSpotTraining": flags.spot,
        "Environment": {
            "VLG_RUN": flags.name,
            "VLG_CHECKPOINTS": f"{run}/checkpoints",
            "PYTHONUNBUFFERED": "1",
        },
    }


def keep_logs(flags: Flags, region: str) -> None:
    """Give the log group that all training jobs of an account share a retention, unless it has one."""
    import boto3

    logs = boto3.client("logs", region_name=region)
    with contextlib.suppress(logs.exceptions.ResourceAlreadyExistsException):
        logs.create_log_group(logGroupName=LOG_GROUP)
    found = logs.describe_log_groups(logGroupNamePrefix=LOG_GROUP)["logGroups"][0]
    if "retentionInDays" not in found:
        logs.put_retention_policy(logGroupName=LOG_GROUP, retentionInDays=flags.log_days)


def remaining(flags: Flags, minutes: int) -> str:
    """What is left of a run for this job of so many minutes; ConfigError if that is nothing."""
    facts = newest_in_s3(f"{s3.s3_url(flags.output)}/{flags.name}/checkpoints/{flags.name}")
    if facts is None:
        return f"run {flags.name}: no checkpoint in S3 yet, it starts at step 0 and has {minutes} minutes in this job"
    given = re.search(r"--train\.max[-_]steps[= ]\s*(\d+)", flags.flags)
    total, step = int(given[1]) if given else facts["max_steps"], facts["step"]
    if total and step >= total:
        raise ConfigError(
            [
                f"--name {flags.name}: the run is complete, step {step} of {total}: a job would train no step. Raise "
                f"--train.max-steps in --flags, or choose another --name"
            ]
        )
    end = f" of {total}" if total else ""
    spent = facts["elapsed_s"] / 60
    return f"run {flags.name}: at step {step}{end} after {spent:.0f} minutes; this job has {minutes} minutes more"


def trainer(flags: Flags, job_request: dict[str, Any], region: str) -> Any:
    """The SDK's ModelTrainer for this request. Its constructor asks AWS for nothing but what `role` may do."""
    os.environ.setdefault("SAGEMAKER_VALIDATE_ROLE", "false")  # its simulation needs iam:SimulatePrincipalPolicy
    import boto3
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.training.configs import (
        Channel,
        CheckpointConfig,
        Compute,
        DataSource,
        MetricDefinition,
        Networking,
        OutputDataConfig,
        S3DataSource,
        SourceCode,
        StoppingCondition,
        Tag,
        TensorBoardOutputConfig,
    )
    from sagemaker.train import ModelTrainer

    channel = job_request["InputDataConfig"][0]
    source = channel["DataSource"]["S3DataSource"]
    stopping = job_request["StoppingCondition"]
    resources, checkpoints = job_request["ResourceConfig"], job_request["CheckpointConfig"]
    bucket = s3.split(flags.output)[0]
    made = ModelTrainer(
        training_image=job_request["AlgorithmSpecification"]["TrainingImage"],
        role=job_request["RoleArn"],
        base_job_name=flags.name,
        sagemaker_session=Session(boto_session=boto3.session.Session(region_name=region), default_bucket=bucket),
        source_code=SourceCode(
            source_dir=str(ROOT), command=COMMAND, requirements=REQUIREMENTS, ignore_patterns=LEFT_OUT
        ),
        compute=Compute(
            instance_type=resources["InstanceType"],
            instance_count=resources["InstanceCount"],
            volume_size_in_gb=resources["VolumeSizeInGB"],
            enable_managed_spot_training=job_request["EnableManagedSpotTraining"],
            volume_kms_key_id=flags.kms_key or None,
        ),
        stopping_condition=StoppingCondition(
            max_runtime_in_seconds=stopping["MaxRuntimeInSeconds"],
            **({"max_wait_time_in_seconds": stopping["MaxWaitTimeInSeconds"]} if flags.spot else {}),
        ),
        output_data_config=OutputDataConfig(
            s3_output_path=job_request["OutputDataConfig"]["S3OutputPath"], kms_key_id=flags.kms_key or None
        ),
        networking=Networking(
            subnets=job_request["VpcConfig"]["Subnets"], security_group_ids=job_request["VpcConfig"]["SecurityGroupIds"]
        )
        if flags.subnets
        else None,
        checkpoint_config=CheckpointConfig(s3_uri=checkpoints["S3Uri"], local_path=checkpoints["LocalPath"]),
        input_data_config=[
            Channel(
                channel_name=channel["ChannelName"],
                input_mode=channel["InputMode"],
                data_source=DataSource(
                    s3_data_source=S3DataSource(
                        s3_data_type=source["S3DataType"],
                        s3_uri=source["S3Uri"],
                        s3_data_distribution_type=source["S3DataDistributionType"],
                    )
                ),
            )
        ],
        hyperparameters=job_request["HyperParameters"],
        environment=job_request["Environment"],
        tags=[Tag(**TAG)],
    )
    board = job_request["TensorBoardOutputConfig"]
    made.with_tensorboard_output_config(
        TensorBoardOutputConfig(s3_output_path=board["S3OutputPath"], local_path=board["LocalPath"])
    )
    patterns = job_request["AlgorithmSpecification"]["MetricDefinitions"]
    made.with_metric_definitions([MetricDefinition(name=item["Name"], regex=item["Regex"]) for item in patterns])
    return made


def launch(flags: Flags, job_request: dict[str, Any], region: str) -> str:
    """Start the job; its artifact's place in S3 if it was waited for, otherwise its name."""
    try:
        import sagemaker.core  # noqa: F401
    except ImportError:
        raise RuntimeError("the SageMaker SDK is not installed: pip install -r sagemaker/requirements.txt") from None
    made = trainer(flags, job_request, region)
    began = time.monotonic()
    made.train(wait=flags.wait, logs=flags.wait)
    job = made._latest_training_job
    if not flags.wait:
        return str(job.training_job_name)
    job.refresh()
    print(f"{job.training_job_status} after {(time.monotonic() - began) / 60:.0f} minutes", file=sys.stderr)
    return str(job.model_artifacts.s3_model_artifacts)


def main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        if "--flags" in words[:-1]:  # its value begins like a flag
            at = words.index("--flags")
            words[at : at + 2] = [f"--flags={words[at + 1]}"]
        flags = parse_flags(Flags, words, examples=__doc__)
        check(flags)
        region = region_of(flags)
        job_request = request(flags, region)
        if flags.dry_run:
            print(json.dumps({**job_request, "added by the SDK": {"source": str(ROOT), "command": COMMAND}}, indent=2))
            return 0
        with s3.readable_errors(f"job {flags.name}"):
            print(remaining(flags, job_minutes(flags)), file=sys.stderr)
            keep_logs(flags, region)
            result = launch(flags, job_request, region)
        print(result)
        if flags.wait:
            deployment = "sagemaker/sagemaker_endpoint_deployment.py"
            print(f"serve it with: python {deployment} --model-data {result} …", file=sys.stderr)
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
