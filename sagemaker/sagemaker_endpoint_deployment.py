"""Deploys a model folder as a real-time, streaming SageMaker endpoint: creates, updates, tests, scales and deletes it.

    python sagemaker/sagemaker_endpoint_deployment.py --model runs/victorian/best --bucket MY-BUCKET \\
        --image ACCOUNT.dkr.ecr.REGION.amazonaws.com/victorian:latest --role arn:aws:iam::ACCOUNT:role/SageMaker
    python sagemaker/sagemaker_endpoint_deployment.py --engine vllm --model … --bucket … --role … --max-instances 4
    python sagemaker/sagemaker_endpoint_deployment.py --delete

Run it again after a change: it updates the endpoint without an interruption, or does nothing if nothing changed.
An endpoint costs money by the hour, used or not; `--delete` removes all that this script made.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import autoscaling  # noqa: E402
from ecr_images import SAGEMAKER, pinned  # noqa: E402

from checkpoint import TRAINING_FILES  # noqa: E402
from cli import parse_flags, run_main  # noqa: E402
from config import SETTINGS, ConfigError, FrozenSettings, GenerationParams  # noqa: E402
from storage import s3  # noqa: E402

# The machine image whose driver goes with the image's CUDA (ProductionVariant.InferenceAmiVersion in the API reference:
# driver 550 and 580). Without one, GPU machines start with driver 470, which is too old for this torch.
AMI = {"cu126": "al2-ami-sagemaker-inference-gpu-3-1", "cu130": "al2023-ami-sagemaker-inference-gpu-4-1"}
DELETED = "Deleted"  # in place of an EndpointStatus
STREAM_S = 480  # a stream's longest duration: an update leaves the old machines for so long
TAG = {"Key": "project", "Value": "victorian-literature-generator"}
LMI_ACCOUNT, LMI_IMAGE = "763104351884", "djl-inference:0.38.0-lmi29.0.0-cu130"
VLLM_PROPERTIES = """engine=Python
option.entryPoint=djl_python.lmi_vllm.vllm_async_service
option.async_mode=true
option.rolling_batch=disable
option.model_id=/opt/ml/model
option.model_loading_timeout=900
"""


class EndpointFlags(FrozenSettings):
    """What both kinds of endpoint need."""

    name: str = Field("victorian", pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,40}$")
    """Name of the endpoint; in lower case, as SageMaker writes it in ARNs."""
    model: Path | None = None
    """Model folder to pack and upload (runs/NAME/best)."""
    model_data: str = ""
    """Instead of --model: a model.tar.gz that is in S3 already (a training job's artifact)."""
    bucket: str = ""
    """S3 bucket for the packed model."""
    image: str = ""
    """Image built from sagemaker/Dockerfile, in this account's ECR."""
    role: str = ""
    """ARN of the role that SageMaker assumes (reads the bucket, pulls the image, writes logs)."""
    region: str = ""
    """AWS region; default: that of the AWS settings."""
    kms_key: str = ""
    """KMS key that encrypts the packed model and the machines' disks; default: AWS's own keys."""
    log_days: Literal[1, 3, 5, 7, 14, 30, 60, 90, 180, 365] = 14
    """Days that the endpoint's log is kept."""
    wait: bool = True
    """Wait until the endpoint is in service, then try it."""
    delete: bool = False
    """Remove the endpoint and everything else this script made under its name."""
    dry_run: bool = False
    """Print the requests, and send none."""


class Flags(EndpointFlags):
    """A real-time endpoint: always on, streams, scales by concurrent requests."""

    engine: Literal["own", "vllm"] = "own"
    """own: this project's server; vllm: AWS's LMI image, for more traffic than one process serves."""
    instance_type: str = "ml.g5.xlarge"
    """Machine; ml.c7i.xlarge and the like run small models without a GPU."""
    instances: int = Field(1, ge=1, le=1000)
    """Machines at least."""
    max_instances: int = Field(1, ge=1, le=1000)
    """Machines at most; above --instances, a scaling policy is made."""
    concurrency: float = Field(12.0, gt=0.0, le=1000.0)
    """Concurrent requests per machine that scaling aims at."""
    slots: int = Field(16, ge=1, le=4096)
    """Texts that one machine writes at the same time (own engine)."""
    cuda: Literal["cu126", "cu130"] = "cu126"
    """CUDA of the image's torch (TORCH_INDEX of the build); chooses the machines' driver."""
    subnets: str = ""
    """Subnets of a VPC, separated by commas, in which the machines run; needs --security-groups."""
    security_groups: str = ""
    """Security groups of the machines, separated by commas."""
    startup_s: int = Field(600, ge=60, le=3600)
    """Seconds that loading may take."""


F = TypeVar("F", bound=EndpointFlags)


def lower_case(flags: F) -> F:
    """The flags with the endpoint's name in lower case: its ARN has it so, and a role's policy is compared with the ARN."""
    return flags.model_copy(update={"name": flags.name.lower()})


def resource_name(name: str, *parts: Any) -> str:
    """`NAME-xxxxxxxx`, with a hash of `parts`: the name changes exactly when they change."""
    return f"{name}-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]}"


def pack(folder: Path, engine: str) -> bytes:
    """A model folder as model.tar.gz; the same folder gives the same bytes."""
    import gzip

    files = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in TRAINING_FILES
    }
    if engine == "vllm":
        files["serving.properties"] = VLLM_PROPERTIES.encode()
        files["model.py"] = (Path(__file__).parent / "vllm_format.py").read_bytes()
        files["sampling_settings.json"] = json.dumps(vllm_settings(folder)).encode()
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name in sorted(files):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(files[name]), 0o644
            tar.addfile(entry, io.BytesIO(files[name]))
    return packed.getvalue()


def vllm_settings(folder: Path) -> dict[str, Any]:
    """For vllm_format.py: vLLM's name of each sampling setting, and the folder's recommended defaults."""
    from storage.gpt2_format import folder_defaults

    names = {name: setting.openai for name, setting in SETTINGS.items() if setting.openai}
    usual = GenerationParams().model_dump(mode="json") | folder_defaults(folder)
    return {"names": names, "defaults": {name: usual[name] for name in names if usual[name] not in (None, [], {})}}


def upload_model(flags: EndpointFlags, engine: str) -> str:
    """The model's S3 URL; uploads the model if it is missing there."""
    if flags.model_data:
        return flags.model_data
    assert flags.model is not None
    packed = pack(flags.model, engine)
    key = f"{artifacts(flags.name)}{hashlib.sha256(packed).hexdigest()[:16]}/model.tar.gz"
    url = f"s3://{flags.bucket}/{key}"
    if not flags.dry_run:
        with s3.readable_errors(url):
            client = s3.client(flags.region or None)
            found = client.list_objects_v2(Bucket=flags.bucket, Prefix=key)
            if not found.get("Contents"):
                print(f"uploading {len(packed) / 1e6:.1f} MB to {url}", file=sys.stderr)
                sealed = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": flags.kms_key} if flags.kms_key else {}
                client.upload_fileobj(io.BytesIO(packed), flags.bucket, key, ExtraArgs=sealed)
    return url


def artifacts(name: str) -> str:
    return f"victorian-endpoints/{name}/"


def check(flags: EndpointFlags, engine: str = "own") -> None:
    """Every missing flag in one ConfigError."""
    errors = []
    if bool(flags.model) == bool(flags.model_data):
        errors.append("give either --model FOLDER or --model-data s3://…/model.tar.gz")
    if flags.model and not (flags.model / "config.json").is_file():
        errors.append(f"--model {flags.model}: no config.json there: give a model folder like runs/NAME/best")
    if flags.model and not flags.bucket:
        errors.append("--bucket is missing: the S3 bucket that the packed model goes to")
    if engine == "own" and not flags.image:
        errors.append("--image is missing: build sagemaker/Dockerfile and push it to ECR (docs/aws.md, step 5)")
    if engine == "vllm" and flags.model_data:
        errors.append(
            f"--engine vllm cannot serve --model-data {flags.model_data}: the archive lacks what vLLM's image reads beside "
            f"the model. Fetch it, and let this command pack it: `mkdir -p served && aws s3 cp {flags.model_data} - | "
            f"tar xz -C served`, then --model served instead of --model-data"
        )
    if not flags.role:
        errors.append("--role is missing: the ARN of a SageMaker execution role (docs/aws.md, step 4)")
    if errors:
        raise ConfigError(errors)


def model_request(
    flags: EndpointFlags, url: str, image: str, environment: dict[str, str], more: dict[str, Any] | None = None
) -> dict[str, Any]:
    container = {"Image": image, "ModelDataUrl": url, "Environment": environment}
    more = more or {}
    parts = [container, flags.role] + ([more] if more else [])
    return {
        "ModelName": resource_name(flags.name, *parts),
        "ExecutionRoleArn": flags.role,
        "PrimaryContainer": container,
        **more,
        "Tags": [TAG],
    }


def config_request(flags: EndpointFlags, model: str, variant: dict[str, Any]) -> dict[str, Any]:
    variants = [{"VariantName": autoscaling.VARIANT, "ModelName": model, "InitialVariantWeight": 1.0, **variant}]
    key = {"KmsKeyId": flags.kms_key} if flags.kms_key else {}
    return {
        "EndpointConfigName": resource_name(flags.name, variants, *key.values()),
        "ProductionVariants": variants,
        **key,
        "Tags": [TAG],
    }


def has_gpu(instance_type: str) -> bool:
    """Whether a machine type has NVIDIA GPUs: the families g and p (g5, g6e, p4d), but not c7g or inf2."""
    return instance_type.startswith(("ml.g", "ml.p"))


def requests(flags: Flags, url: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls that make the endpoint: (operation, parameters) in order."""
    gpu, own = has_gpu(flags.instance_type), flags.engine == "own"
    if own:
        # told cuda, the server does not start without a GPU; left alone, it would write on the CPU at the GPU's price
        device = {"VLG_DEVICE": "cuda"} if gpu else {}
        image, environment = flags.image, {"VLG_SLOTS": str(flags.slots), **device}
    else:
        image = flags.image or f"{LMI_ACCOUNT}.dkr.ecr.{flags.region or default_region()}.amazonaws.com/{LMI_IMAGE}"
        environment = {"HF_HUB_OFFLINE": "1"}
    place: dict[str, Any] = {"EnableNetworkIsolation": True} if own else {}
    if flags.subnets:
        place["VpcConfig"] = {
            "Subnets": flags.subnets.split(","), "SecurityGroupIds": flags.security_groups.split(",")
        }  # fmt: skip
    model = model_request(flags, url, image, environment, place)
    variant = {
        "InstanceType": flags.instance_type,
        "InitialInstanceCount": flags.instances,
        "ContainerStartupHealthCheckTimeoutInSeconds": flags.startup_s,
        "ModelDataDownloadTimeoutInSeconds": flags.startup_s,
        "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
        **({"InferenceAmiVersion": AMI[flags.cuda if own else "cu130"]} if gpu else {}),
    }
    return [("create_model", model), ("create_endpoint_config", config_request(flags, model["ModelName"], variant))]


def scaling(flags: Flags) -> list[autoscaling.Call]:
    """The calls that make instances follow the number of concurrent requests; empty where their number is fixed."""
    if flags.max_instances <= flags.instances:
        return []
    return autoscaling.calls(flags.name, flags.instances, flags.max_instances, flags.concurrency)


def default_region() -> str:
    import boto3

    region = boto3.session.Session().region_name
    if not region:
        raise ConfigError(["no AWS region: give --region, or set AWS_DEFAULT_REGION"])
    return region


def service(name: str, flags: EndpointFlags, **settings: Any) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(**{"retries": {"mode": "standard", "total_max_attempts": 5}, **settings})
    return boto3.client(name, region_name=flags.region or default_region(), config=config)


def does_not_exist(call: Callable[..., Any], **names: str) -> bool:
    """Whether a `describe_*` call finds nothing of this name."""
    from botocore.exceptions import ClientError

    try:
        call(**names)
    except ClientError as error:
        if says_missing(error):
            return True
        raise
    return False


def says_missing(error: Any) -> bool:
    """Whether a service's error says that there is nothing of the name."""
    said = f"{error.response['Error'].get('Code')} {error.response['Error'].get('Message')}".lower()
    return any(words in said for words in ("could not find", "notfound", "not found", "does not exist"))


def deploy(
    flags: EndpointFlags, calls: list[autoscaling.Call], sagemaker: Any, update: dict[str, Any] | None = None
) -> str:
    """Create model and configuration if missing and point the endpoint at them; returns what was done.

    update: more parameters of UpdateEndpoint.
    """
    model, config = (parameters for _, parameters in calls)
    if does_not_exist(sagemaker.describe_model, ModelName=model["ModelName"]):
        sagemaker.create_model(**model)
    wanted = config["EndpointConfigName"]
    if does_not_exist(sagemaker.describe_endpoint_config, EndpointConfigName=wanted):
        sagemaker.create_endpoint_config(**config)
    if does_not_exist(sagemaker.describe_endpoint, EndpointName=flags.name):
        keep_logs(flags)
        sagemaker.create_endpoint(EndpointName=flags.name, EndpointConfigName=wanted, Tags=[TAG])
        return "created"
    found = wait_until_stable(sagemaker, flags.name)
    if found["EndpointStatus"] == DELETED:
        sagemaker.create_endpoint(EndpointName=flags.name, EndpointConfigName=wanted, Tags=[TAG])
        return "created"
    if found["EndpointStatus"] != "InService":
        sagemaker.delete_endpoint(EndpointName=flags.name)
        sagemaker.get_waiter("endpoint_deleted").wait(EndpointName=flags.name)
        sagemaker.create_endpoint(EndpointName=flags.name, EndpointConfigName=wanted, Tags=[TAG])
        return "created again after a failure"
    if found["EndpointConfigName"] == wanted:
        return "up to date"
    sagemaker.update_endpoint(EndpointName=flags.name, EndpointConfigName=wanted, **(update or {}))
    return "updated"


def log_group(name: str) -> str:
    return f"/aws/sagemaker/Endpoints/{name}"


def keep_logs(flags: EndpointFlags) -> None:
    """Make the log group that SageMaker would make without an end to its retention."""
    logs = service("logs", flags)
    with contextlib.suppress(logs.exceptions.ResourceAlreadyExistsException):
        logs.create_log_group(logGroupName=log_group(flags.name), tags={TAG["Key"]: TAG["Value"]})
    logs.put_retention_policy(logGroupName=log_group(flags.name), retentionInDays=flags.log_days)


def wait_until_stable(sagemaker: Any, name: str, seconds: float = 2400, pause: float = 10) -> dict[str, Any]:
    """The endpoint's description once nothing changes it any more; only a status, DELETED, if it has gone by then."""
    from botocore.exceptions import ClientError

    until, said = time.monotonic() + seconds, ""
    while True:
        try:
            found: dict[str, Any] = sagemaker.describe_endpoint(EndpointName=name)
        except ClientError as error:
            if says_missing(error):
                return {"EndpointStatus": DELETED, "FailureReason": "it was deleted"}
            raise
        if found["EndpointStatus"] in ("InService", "Failed", "UpdateRollbackFailed", "OutOfService"):
            return found
        if time.monotonic() > until:
            raise RuntimeError(f"endpoint {name} is still being changed after {seconds / 60:.0f} minutes: try again")
        if found["EndpointStatus"] != said:
            said = found["EndpointStatus"]
            print(f"endpoint {name}: {said}", file=sys.stderr)
        time.sleep(pause)


def wait_in_service(sagemaker: Any, name: str, config: str) -> None:
    """Return when the endpoint is in service with the configuration; RuntimeError with SageMaker's reason if it fails.

    A failed update ends InService as well, on the configuration before it.
    """
    found = wait_until_stable(sagemaker, name)
    reason = found.get("FailureReason") or "SageMaker gives no reason"
    log = f"its log: CloudWatch, {log_group(name)}"
    if found["EndpointStatus"] != "InService":
        raise RuntimeError(f"endpoint {name} is not in service ({found['EndpointStatus']}): {reason}; {log}")
    if found["EndpointConfigName"] != config:
        raise RuntimeError(
            f"endpoint {name} could not be updated and still runs {found['EndpointConfigName']}: {reason}; {log}"
        )


def mine(sagemaker: Any, name: str, kind: str) -> Iterator[str]:
    """Names of the models or endpoint configurations that this script made for `name`."""
    operation, listed, field = {
        "model": ("list_models", "Models", "ModelName"),
        "config": ("list_endpoint_configs", "EndpointConfigs", "EndpointConfigName"),
    }[kind]
    for page in sagemaker.get_paginator(operation).paginate(NameContains=f"{name}-"):
        for item in page[listed]:
            start, _, ending = item[field].rpartition("-")
            if start == name and len(ending) == 8 and set(ending) <= set("0123456789abcdef"):
                yield item[field]


def delete_old_versions(sagemaker: Any, name: str, keep: set[str]) -> None:
    """Delete earlier models and configurations of this endpoint."""
    for config in [found for found in mine(sagemaker, name, "config") if found not in keep]:
        sagemaker.delete_endpoint_config(EndpointConfigName=config)
    for model in [found for found in mine(sagemaker, name, "model") if found not in keep]:
        sagemaker.delete_model(ModelName=model)


def remove(flags: EndpointFlags) -> list[str]:
    """Delete everything made under the name; returns what was deleted. Already deleted resources are ignored."""
    from botocore.exceptions import ClientError

    done: list[str] = []
    sagemaker = service("sagemaker", flags)
    scaler = service("application-autoscaling", flags)
    there = wait_until_stable(sagemaker, flags.name)["EndpointStatus"] != DELETED  # in mid-change it cannot be deleted
    if autoscaling.found(scaler, flags.name):
        autoscaling.remove(scaler, flags.name)
        done.append("scaling policy")
    if there:
        sagemaker.delete_endpoint(EndpointName=flags.name)
        sagemaker.get_waiter("endpoint_deleted").wait(EndpointName=flags.name, WaiterConfig={"Delay": 5})
        done.append(f"endpoint {flags.name}")
    for kind, delete, field in (
        ("config", sagemaker.delete_endpoint_config, "EndpointConfigName"),
        ("model", sagemaker.delete_model, "ModelName"),
    ):
        for name in list(mine(sagemaker, flags.name, kind)):
            delete(**{field: name})
            done.append(f"{kind} {name}")
    if flags.bucket:
        client = s3.client(flags.region or None)
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=flags.bucket, Prefix=artifacts(flags.name)):
            for item in page.get("Contents", []):
                client.delete_object(Bucket=flags.bucket, Key=item["Key"])
                done.append(f"s3://{flags.bucket}/{item['Key']}")
    try:
        service("logs", flags).delete_log_group(logGroupName=log_group(flags.name))
        done.append("log group")
    except ClientError as error:
        if error.response["Error"]["Code"] != "ResourceNotFoundException":
            raise
    return done


def smoke_test(runtime: Any, name: str, stream: bool) -> str:
    """Generate twenty tokens; returns the text. RuntimeError if the stream ends early."""
    body = {"prompt": "It was", "max_tokens": 20, "seed": 1, "stream": stream}
    call = {"EndpointName": name, "ContentType": "application/json", "Body": json.dumps(body).encode()}
    if not stream:
        return json.loads(runtime.invoke_endpoint(**call)["Body"].read())["generated_text"]
    text, rest, end = "", b"", None
    for event in runtime.invoke_endpoint_with_response_stream(**call)["Body"]:
        *lines, rest = (rest + event.get("PayloadPart", {}).get("Bytes", b"")).split(b"\n")
        for line in filter(bytes.strip, lines):
            message = json.loads(line)
            text += message.get("text", "") if message["type"] == "token" else ""
            end = message if message["type"] in ("complete", "error") else end
    if not end or end["type"] == "error":
        raise RuntimeError(f"endpoint {name}: the stream ended early: {end}")
    return text


def usage(flags: EndpointFlags, mode: str, tokens: int) -> str:
    """How to call the endpoint, and how to delete it."""
    script = Path(sys.argv[0]).name
    return f"""endpoint {flags.name} is in service.

Call it:
    import boto3, json
    runtime = boto3.client("sagemaker-runtime", region_name="{flags.region or default_region()}")
    body = json.dumps({{"prompt": "It was", "max_tokens": {min(tokens, 100)}}})
    answer = runtime.invoke_endpoint(EndpointName="{flags.name}", ContentType="application/json", Body=body)
    print(json.load(answer["Body"])["generated_text"])
Put the WebSocket gateway before it:
    python lambda/deploy_relay.py --bucket {flags.bucket or "MY-BUCKET"} --endpoint {flags.name} --mode {mode} \
      --max-tokens {tokens} --new-token NAME
Remove it when you are done:
    python sagemaker/{script} --name {flags.name} --delete {f"--bucket {flags.bucket}" if flags.bucket else ""}"""


def deploy_and_test(
    flags: EndpointFlags, calls: list[autoscaling.Call], *, stream: bool, update: dict[str, Any] | None = None
) -> None:
    """Deploy, wait, test, and delete the old versions."""
    sagemaker = service("sagemaker", flags)
    done = deploy(flags, calls, sagemaker, update)
    print(f"endpoint {flags.name}: {done}", file=sys.stderr)
    if flags.wait:
        if done != "up to date":
            print("waiting until it is in service (five to ten minutes)", file=sys.stderr)
        wait_in_service(sagemaker, flags.name, calls[1][1]["EndpointConfigName"])
        runtime = service("sagemaker-runtime", flags, read_timeout=70, retries={"total_max_attempts": 1})
        print(f"sample output: It was{smoke_test(runtime, flags.name, stream)}", file=sys.stderr)
        delete_old_versions(sagemaker, flags.name, {calls[0][1]["ModelName"], calls[1][1]["EndpointConfigName"]})


def deploy_scaled(flags: Flags, calls: list[autoscaling.Call]) -> None:
    """Deploy with the scaling taken away, and make it afterwards; a deployment that fails gets its old scaling back."""
    scaler, wanted = service("application-autoscaling", flags), scaling(flags)
    before = autoscaling.found(scaler, flags.name)
    switch = {"TrafficRoutingConfiguration": {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": 0}}
    update: dict[str, Any] = {
        "DeploymentConfig": {"BlueGreenUpdatePolicy": {**switch, "TerminationWaitInSeconds": STREAM_S}}
    }
    if before and wanted:
        update["RetainAllVariantProperties"] = True  # the number of instances that scaling has arrived at
    if before:
        autoscaling.remove(scaler, flags.name)
    try:
        deploy_and_test(flags, calls, stream=True, update=update)
    except BaseException:
        autoscaling.apply(scaler, before)
        raise
    if wanted:  # registering needs an endpoint that is in service
        wait_in_service(service("sagemaker", flags), flags.name, calls[1][1]["EndpointConfigName"])
    autoscaling.apply(scaler, wanted)


def delete_all(flags: EndpointFlags) -> int:
    for line in remove(flags) or [f"nothing named {flags.name} was found"]:
        print(f"deleted: {line}" if not line.startswith("nothing") else line, file=sys.stderr)
    if not flags.bucket:
        print("the packed model in S3 stays: give --bucket to delete it as well", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        flags = lower_case(parse_flags(Flags, argv, examples=__doc__))
        with s3.readable_errors(f"endpoint {flags.name}"):
            if flags.delete:
                return delete_all(flags)
            check(flags, flags.engine)
            if bool(flags.subnets) != bool(flags.security_groups):
                raise ConfigError(["--subnets and --security-groups belong together: give both, or none"])
            if not flags.dry_run:
                flags = flags.model_copy(update={"image": pinned(flags.image, service("ecr", flags), SAGEMAKER)})
            calls = requests(flags, upload_model(flags, flags.engine))
            if flags.dry_run:
                print(json.dumps([{name: parameters} for name, parameters in calls + scaling(flags)], indent=2))
                return 0
            deploy_scaled(flags, calls)
            print(usage(flags, "stream", 2000))
        return 0

    return run_main(body)


if __name__ == "__main__":
    sys.exit(main())
