"""Endpoint deployments against moto's server: what is sent, in which order, and that all of it goes away again."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import sys
import tarfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aws_fakes import FakeContainer, words
from local_stack import Stack

from support.helpers import ROOT


def load(name: str) -> Any:
    found = importlib.util.spec_from_file_location(name, ROOT / "sagemaker" / f"{name}.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


realtime = load("sagemaker_endpoint_deployment")
serverless = load("sagemaker_serverless_endpoint_deployment")
ecr_images = sys.modules["ecr_images"]

ROLE = "arn:aws:iam::123456789012:role/SageMaker"
REPOSITORY = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/victorian"
IMAGE = f"{REPOSITORY}:1"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = pytest.importorskip("moto.server", reason="needs moto[server]: pip install -r requirements-aws.txt")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def account(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty account on the server, with one bucket."""
    import urllib.request

    from storage import s3

    urllib.request.urlopen(urllib.request.Request(f"{server}/moto-api/reset", method="POST")).close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    s3.client().create_bucket(Bucket="models", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    push("1")
    return server


def push(tag: str, kind: str = ecr_images.DOCKER, layer: str = "zeroth") -> str:
    """An image in ECR with a manifest of media type `kind`; its digest."""
    import boto3

    ecr = boto3.client("ecr")
    with contextlib.suppress(ecr.exceptions.RepositoryAlreadyExistsException):
        ecr.create_repository(repositoryName="victorian")
    part = {"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", "size": 1, "digest": layer}
    manifest = {"schemaVersion": 2, "mediaType": kind, "config": part, "layers": [part], "manifests": [part]}
    sent = ecr.put_image(
        repositoryName="victorian", imageManifest=json.dumps(manifest), imageManifestMediaType=kind, imageTag=tag
    )
    return sent["image"]["imageId"]["imageDigest"]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Every call that changes something: (operation, parameters) as boto3 is given them."""
    calls: list[tuple[str, dict[str, Any]]] = []
    made = realtime.service

    def recording(name: str, flags: Any, **settings: Any) -> Any:
        client = made(name, flags, **settings)

        def note(params: dict[str, Any], model: Any, **_: Any) -> None:
            if not re.match("Describe|List", model.name):
                calls.append((model.name, json.loads(json.dumps(params, default=str))))

        client.meta.events.register("provide-client-params.*", note)
        return client

    monkeypatch.setattr(realtime, "service", recording)
    return calls


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "config.json").write_text('{"n_positions": 64}')
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "training_state.safetensors").write_bytes(b"moments" * 1000)
    (folder / "training_state.json").write_text("{}")
    return folder


def arguments(model: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--bucket", "models", "--role", ROLE, "--image", IMAGE, "--no-wait", *more]


def test_a_realtime_endpoint_is_requested(account: str, sent: Any, model: Path) -> None:
    flags = ["--instance-type", "ml.m5.xlarge", "--instances", "2", "--max-instances", "6", "--concurrency", "9"]
    assert realtime.main(arguments(model, *flags)) == 0
    calls = dict(sent)
    assert [name for name, _ in sent] == [
        "CreateModel", "CreateEndpointConfig", "CreateLogGroup", "PutRetentionPolicy", "CreateEndpoint",
        "RegisterScalableTarget", "PutScalingPolicy",
    ]  # fmt: skip
    container = calls["CreateModel"]["PrimaryContainer"]
    assert container["Image"].startswith(f"{REPOSITORY}@sha256:")
    assert container["Environment"] == {"VLG_SLOTS": "16"}
    assert calls["CreateModel"]["EnableNetworkIsolation"] is True
    assert calls["CreateModel"]["ExecutionRoleArn"] == ROLE
    variant = calls["CreateEndpointConfig"]["ProductionVariants"][0]
    assert (variant["InstanceType"], variant["InitialInstanceCount"]) == ("ml.m5.xlarge", 2)
    assert variant["ModelName"] == calls["CreateModel"]["ModelName"]
    assert 60 <= variant["ContainerStartupHealthCheckTimeoutInSeconds"] <= 3600
    assert calls["CreateEndpoint"]["EndpointConfigName"] == calls["CreateEndpointConfig"]["EndpointConfigName"]
    for name in ("CreateModel", "CreateEndpointConfig", "CreateEndpoint"):
        assert calls[name]["Tags"] == [realtime.TAG]
    target = calls["RegisterScalableTarget"]
    assert (target["MinCapacity"], target["MaxCapacity"]) == (2, 6)
    assert target["ResourceId"] == "endpoint/victorian/variant/primary"
    policy = calls["PutScalingPolicy"]["TargetTrackingScalingPolicyConfiguration"]
    assert policy["TargetValue"] == 9.0
    assert "ConcurrentRequests" in policy["PredefinedMetricSpecification"]["PredefinedMetricType"]


def test_the_packed_model_holds_the_folder_and_no_training_state(account: str, sent: Any, model: Path) -> None:
    from storage import s3

    assert realtime.main(arguments(model, "--instance-type", "ml.m5.xlarge")) == 0
    bucket, key = dict(sent)["CreateModel"]["PrimaryContainer"]["ModelDataUrl"].removeprefix("s3://").split("/", 1)
    packed = s3.client().get_object(Bucket=bucket, Key=key)["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert tar.getnames() == ["config.json", "model.safetensors"]
        assert tar.extractfile("model.safetensors").read() == (model / "model.safetensors").read_bytes()
    assert realtime.pack(model, "own") == packed


def with_update(service: Any, reason: str = "") -> Any:
    """UpdateEndpoint, which moto lacks: it is answered and changes nothing, as when the service rolls it back."""
    from botocore.awsrequest import AWSResponse

    class Raw:
        def stream(self, *_: object, **__: object) -> Iterator[bytes]:
            yield b'{"EndpointArn": "arn:aws:sagemaker:eu-west-1:123456789012:endpoint/victorian"}'

    def made(name: str, flags: Any, **settings: Any) -> Any:
        client = service(name, flags, **settings)
        reply = lambda **_: AWSResponse("", 200, {}, Raw())  # noqa: E731
        client.meta.events.register("before-send.sagemaker.UpdateEndpoint", reply)
        explain = lambda parsed, **_: parsed.update({"FailureReason": reason} if reason else {})  # noqa: E731
        client.meta.events.register("after-call.sagemaker.DescribeEndpoint", explain)
        return client

    return made


def test_the_same_again_does_nothing_and_a_change_updates(
    account: str, sent: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert realtime.main(arguments(model, "--instance-type", "ml.m5.xlarge")) == 0
    first = dict(sent)
    sent.clear()
    assert realtime.main(arguments(model, "--instance-type", "ml.m5.xlarge")) == 0
    assert sent == []

    monkeypatch.setattr(realtime, "service", with_update(realtime.service))
    (model / "model.safetensors").write_bytes(b"better" * 100)
    assert realtime.main(arguments(model, "--instance-type", "ml.m5.xlarge")) == 0
    assert [name for name, _ in sent] == ["CreateModel", "CreateEndpointConfig", "UpdateEndpoint"]
    changed = dict(sent)
    assert changed["UpdateEndpoint"]["EndpointConfigName"] != first["CreateEndpoint"]["EndpointConfigName"]
    assert changed["CreateModel"]["ModelName"] != first["CreateModel"]["ModelName"]


def test_a_serverless_endpoint_is_requested(account: str, sent: Any, model: Path) -> None:
    flags = ["--memory-mb", "3072", "--max-concurrency", "7", "--provisioned", "2", "--tokens-per-s", "4"]
    assert serverless.main(arguments(model, *flags)) == 0
    assert [name for name, _ in sent if "Log" not in name and "Retention" not in name] == [
        "CreateModel", "CreateEndpointConfig", "CreateEndpoint",
    ]  # fmt: skip
    calls = dict(sent)
    variant = calls["CreateEndpointConfig"]["ProductionVariants"][0]
    wanted = {"MemorySizeInMB": 3072, "MaxConcurrency": 7, "ProvisionedConcurrency": 2}
    assert variant["ServerlessConfig"] == wanted
    assert not {"InstanceType", "InitialInstanceCount"} & set(variant)
    environment = calls["CreateModel"]["PrimaryContainer"]["Environment"]
    assert environment["VLG_MAX_TOKENS"] == "200" and float(environment["VLG_DEADLINE_S"]) < 60


def test_the_vllm_engine_is_requested(account: str, sent: Any, model: Path) -> None:
    words_ = arguments(model, "--engine", "vllm", "--instance-type", "ml.g4dn.xlarge", "--max-instances", "3")
    words_ = [word for word in words_ if word not in ("--image", IMAGE)]
    assert realtime.main(words_) == 0
    container = dict(sent)["CreateModel"]["PrimaryContainer"]
    assert re.fullmatch(r"763104351884\.dkr\.ecr\.eu-west-1\.amazonaws\.com/djl-inference:.+", container["Image"])
    with tarfile.open(fileobj=io.BytesIO(realtime.pack(model, "vllm"))) as tar:
        assert tar.getnames() == [
            "config.json", "model.py", "model.safetensors", "sampling_settings.json", "serving.properties"
        ]  # fmt: skip
    assert "PutScalingPolicy" in dict(sent)


def test_delete_leaves_nothing_of_its_own(account: str, sent: Any, model: Path) -> None:
    import boto3

    from storage import s3

    assert realtime.main(arguments(model, "--instance-type", "ml.m5.xlarge", "--max-instances", "2")) == 0
    assert serverless.main(arguments(model)) == 0
    sagemaker = boto3.client("sagemaker")
    sagemaker.create_model(ModelName="victorian-novel", ExecutionRoleArn=ROLE, PrimaryContainer={"Image": IMAGE})
    assert realtime.main(["--delete", "--bucket", "models"]) == 0
    left = [item["ModelName"] for item in sagemaker.list_models()["Models"]]
    assert sorted(name.rpartition("-")[0] for name in left) == ["victorian", "victorian-serverless"]
    assert "victorian-novel" in left
    assert [item["EndpointName"] for item in sagemaker.list_endpoints()["Endpoints"]] == ["victorian-serverless"]
    assert serverless.main(["--delete", "--bucket", "models"]) == 0
    assert [item["ModelName"] for item in sagemaker.list_models()["Models"]] == ["victorian-novel"]
    assert not sagemaker.list_endpoint_configs()["EndpointConfigs"]
    assert not s3.client().list_objects_v2(Bucket="models").get("Contents")
    autoscaling = boto3.client("application-autoscaling")
    assert not autoscaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert not boto3.client("logs").describe_log_groups()["logGroups"]
    assert realtime.main(["--delete"]) == 0


def test_a_gpu_endpoint_gets_the_driver_of_its_images_cuda(account: str, sent: Any, model: Path) -> None:
    """https://docs.aws.amazon.com/sagemaker/latest/dg/inference-gpu-drivers.html: g5 starts with driver 470 unless told."""
    import botocore.session

    for flags, ami in ([], "al2-ami-sagemaker-inference-gpu-3-1"), (["--cuda", "cu130"], "al2023-ami-sagemaker-inference-gpu-4-1"):  # fmt: skip
        sent.clear()
        assert realtime.main(arguments(model, "--instance-type", "ml.g4dn.xlarge", "--name", f"e{len(flags)}", *flags)) == 0  # fmt: skip
        calls = dict(sent)
        assert calls["CreateEndpointConfig"]["ProductionVariants"][0]["InferenceAmiVersion"] == ami
        assert calls["CreateModel"]["PrimaryContainer"]["Environment"]["VLG_DEVICE"] == "cuda"
    known = botocore.session.get_session().get_service_model("sagemaker")
    assert set(realtime.AMI.values()) <= set(known.shape_for("ProductionVariantInferenceAmiVersion").enum)
    kinds = ("ml.g5.xlarge", "ml.g6e.xlarge", "ml.p4d.24xlarge", "ml.c7g.xlarge", "ml.m5.xlarge", "ml.inf2.xlarge")
    assert [realtime.has_gpu(kind) for kind in kinds] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    "kind",
    ["application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json",
     "application/vnd.docker.distribution.manifest.list.v2+json"],
)  # fmt: skip
def test_an_image_that_sagemaker_refuses_is_named_before_anything_is_made(
    account: str, sent: Any, model: Path, capsys: Any, kind: str
) -> None:
    """CreateModel answers "Unsupported manifest media type": aws/amazon-sagemaker-feedback#180, mlflow/mlflow#13834."""
    push("new", kind, kind)
    for script in (realtime, serverless):
        assert script.main([*arguments(model), "--image", f"{REPOSITORY}:new"]) == 2
        said = capsys.readouterr().err
        assert kind in said and "--provenance=false" in said and "oci-mediatypes=false" in said
    assert sent == []
    assert realtime.main([*arguments(model), "--image", f"{REPOSITORY}:absent"]) == 2
    assert "no such image" in capsys.readouterr().err


def test_a_tag_that_was_pushed_again_is_deployed(
    account: str, sent: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ECR's tags can be moved (imageTagMutability MUTABLE is a repository's default)."""
    monkeypatch.setattr(realtime, "service", with_update(realtime.service))
    digests = []
    for layer in ("first", "second"):
        digests.append(push("2", layer=layer))
        assert realtime.main(arguments(model, "--instance-type", "ml.m5.xlarge", "--image", f"{REPOSITORY}:2")) == 0
    images = [given["PrimaryContainer"]["Image"] for name, given in sent if name == "CreateModel"]
    assert images == [f"{REPOSITORY}@{digest}" for digest in digests] and digests[0] != digests[1]
    assert "UpdateEndpoint" in dict(sent)


def test_an_update_that_is_rolled_back_deletes_nothing(
    account: str, sent: Any, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """After a failed update the endpoint is InService on the configuration before it (DescribeEndpoint's EndpointStatus:
    RollingBack, "once the rollback completes, endpoint returns to an InService status")."""
    flags = arguments(model, "--instance-type", "ml.m5.xlarge", "--max-instances", "3")
    assert realtime.main(flags) == 0
    kept = dict(sent)["CreateEndpoint"]["EndpointConfigName"]
    sent.clear()
    monkeypatch.setattr(
        realtime, "service", with_update(realtime.service, "the primary container did not pass the ping")
    )
    monkeypatch.setattr(realtime, "smoke_test", lambda *_: " sound")
    (model / "model.safetensors").write_bytes(b"broken" * 100)
    assert realtime.main([word for word in flags if word != "--no-wait"]) == 1
    said = capsys.readouterr().err
    assert "did not pass the ping" in said and kept in said
    assert not {"DeleteModel", "DeleteEndpointConfig"} & {name for name, _ in sent}
    scaled = [name for name, _ in sent if "Scal" in name]
    assert scaled[-2:] == ["RegisterScalableTarget", "PutScalingPolicy"] and "DeregisterScalableTarget" in scaled


class Endpoints:
    """An endpoint that is found in one state after the other; None: no longer there."""

    def __init__(self, *states: str | None):
        self.states, self.calls = list(states), []

    def describe_endpoint(self, EndpointName: str) -> dict[str, Any]:
        from botocore.exceptions import ClientError

        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state is None:
            said = f'Could not find endpoint "{EndpointName}".'
            raise ClientError({"Error": {"Code": "ValidationException", "Message": said}}, "DescribeEndpoint")
        return {"EndpointStatus": state, "EndpointConfigName": "old"}

    def get_waiter(self, name: str) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda **given: self.calls.append(name)


@pytest.mark.parametrize(
    ("states", "done", "calls"),
    [
        (["Updating", "Updating", "RollingBack", "InService"], "updated", ["update_endpoint"]),
        (["Deleting", "Deleting", None], "created", ["create_endpoint"]),
        (["OutOfService"], "created again after a failure", ["delete_endpoint", "wait", "create_endpoint"]),
        (["UpdateRollbackFailed"], "created again after a failure", ["delete_endpoint", "wait", "create_endpoint"]),
    ],
)
def test_an_endpoint_in_mid_change_is_waited_for(
    states: list[str | None], done: str, calls: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Each EndpointStatus of DescribeEndpoint: https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_DescribeEndpoint.html."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(realtime, "keep_logs", lambda flags: None)
    sagemaker, wanted = Endpoints(*states), {"EndpointConfigName": "new"}
    flags = realtime.Flags(name="victorian")
    assert realtime.deploy(flags, [("", {"ModelName": "m"}), ("", wanted)], sagemaker) == done
    assert [name for name in sagemaker.calls if "describe" not in name] == calls
    with pytest.raises(RuntimeError, match=r"OutOfService|it was deleted|not in service|still runs old"):
        realtime.wait_in_service(Endpoints(*states), "victorian", "new")
    assert capsys.readouterr().err.count("Updating") <= 2


def test_delete_waits_for_an_endpoint_in_mid_change(
    account: str, sent: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SageMaker deletes no endpoint that is being made or updated: "Cannot update in-progress endpoint"."""
    assert realtime.main(arguments(model, "--instance-type", "ml.m5.xlarge")) == 0
    asked: list[str] = []
    stable = realtime.wait_until_stable
    monkeypatch.setattr(
        realtime, "wait_until_stable", lambda client, name: asked.append(str(len(sent))) or stable(client, name)
    )
    sent.clear()
    assert realtime.main(["--delete"]) == 0
    assert asked == ["0"] and sent[0][0] == "DeleteEndpoint"


def test_scaling_survives_an_update(account: str, sent: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deregister, update, register: https://docs.aws.amazon.com/sagemaker/latest/dg/endpoint-scaling.html."""
    import boto3

    flags = arguments(model, "--instance-type", "ml.m5.xlarge")
    assert realtime.main([*flags, "--max-instances", "4"]) == 0
    variant = dict(sent)["CreateEndpointConfig"]["ProductionVariants"][0]
    assert variant["RoutingConfig"] == {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"}
    sent.clear()
    made = realtime.service
    monkeypatch.setattr(realtime, "service", with_update(made))
    monkeypatch.setattr(realtime, "wait_in_service", lambda *_: None)
    assert realtime.main([*flags, "--max-instances", "3", "--startup-s", "700"]) == 0
    order = [
        name for name, _ in sent if name in ("DeregisterScalableTarget", "UpdateEndpoint", "RegisterScalableTarget")
    ]
    assert order == ["DeregisterScalableTarget", "UpdateEndpoint", "RegisterScalableTarget"]
    update = dict(sent)["UpdateEndpoint"]
    assert update["RetainAllVariantProperties"] is True
    assert update["DeploymentConfig"]["BlueGreenUpdatePolicy"]["TerminationWaitInSeconds"] >= 480
    sent.clear()
    assert realtime.main([*flags, "--startup-s", "800"]) == 0
    assert "RetainAllVariantProperties" not in dict(sent)["UpdateEndpoint"]
    scaler = boto3.client("application-autoscaling")
    assert not scaler.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert not scaler.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]


def test_vllm_refuses_an_archive_without_its_files(capsys: Any, tmp_path: Path) -> None:
    """LMI reads serving.properties and model.py from the archive; a training job's artifact has neither."""
    words_ = ["--engine", "vllm", "--model-data", "s3://b/runs/x/model.tar.gz", "--role", ROLE, "--dry-run"]
    assert realtime.main(words_) == 2
    said = capsys.readouterr().err
    assert "aws s3 cp s3://b/runs/x/model.tar.gz" in said and "--model served" in said


def test_names_are_those_of_the_arn(account: str, sent: Any, model: Path) -> None:
    """SageMaker writes an endpoint's name in lower case in its ARN, which a policy's Resource is compared with."""
    assert realtime.main(arguments(model, "--instance-type", "ml.m5.xlarge", "--name", "Novel")) == 0
    assert dict(sent)["CreateEndpoint"]["EndpointName"] == "novel"


def test_guard_rails_of_an_endpoint(account: str, sent: Any, model: Path, capsys: Any) -> None:
    flags = ["--instance-type", "ml.m5.xlarge", "--kms-key", "alias/mine", "--log-days", "30"]
    assert realtime.main(arguments(model, *flags, "--subnets", "subnet-1,subnet-2")) == 2
    assert "--security-groups" in capsys.readouterr().err
    assert realtime.main(arguments(model, *flags, "--subnets", "subnet-1,subnet-2", "--security-groups", "sg-1")) == 0
    calls = dict(sent)
    assert calls["CreateModel"]["VpcConfig"] == {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]}
    assert calls["CreateEndpointConfig"]["KmsKeyId"] == "alias/mine"
    assert calls["PutRetentionPolicy"] == {"logGroupName": "/aws/sagemaker/Endpoints/victorian", "retentionInDays": 30}


def test_dry_runs_send_nothing(monkeypatch: pytest.MonkeyPatch, model: Path, capsys: Any) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert realtime.main(arguments(model, "--dry-run", "--max-instances", "2")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [next(iter(entry)) for entry in printed] == [
        "create_model", "create_endpoint_config", "register_scalable_target", "put_scaling_policy",
    ]  # fmt: skip
    assert serverless.main(arguments(model, "--dry-run")) == 0
    assert "ServerlessConfig" in capsys.readouterr().out


def test_missing_flags_are_all_named(capsys: Any, tmp_path: Path) -> None:
    assert realtime.main([]) == 2
    said = capsys.readouterr().err
    assert all(flag in said for flag in ("--model", "--image", "--role"))
    assert realtime.main(arguments(tmp_path)) == 2
    assert "config.json" in capsys.readouterr().err
    assert serverless.main(["--memory-mb", "2048", "--max-concurrency", "500"]) == 2
    assert serverless.main(arguments(tmp_path, "--provisioned", "9")) == 2


def test_the_smoke_test_reads_both_kinds_of_answer(stack: Stack, container: FakeContainer) -> None:
    import boto3

    runtime = boto3.client("sagemaker-runtime", endpoint_url=stack.aws_url)
    for stream in (True, False):
        assert realtime.smoke_test(runtime, "victorian", stream) == "".join(words("It was", 20))
    container.fault = "error_amid"
    with pytest.raises(RuntimeError, match="the stream ended early"):
        realtime.smoke_test(runtime, "victorian", True)


@pytest.fixture
def formatter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The vLLM image's formatters, loaded beside a model as the image does."""
    for name, decorator in (("input_parser", "input_formatter"), ("output_formatter", "output_formatter")):
        module = types.ModuleType(f"djl_python.{name}")
        setattr(module, decorator, lambda function: function)
        monkeypatch.setitem(sys.modules, f"djl_python.{name}", module)
    monkeypatch.setitem(sys.modules, "djl_python", types.ModuleType("djl_python"))
    (tmp_path / "config.json").write_text('{"n_positions": 64}')
    (tmp_path / "generation_config.json").write_text('{"suppress_tokens": [300, 301]}')
    (tmp_path / "tokenizer_config.json").write_text('{"styles": ["ash", "birch"]}')
    (tmp_path / "sampling_settings.json").write_text(json.dumps(realtime.vllm_settings(tmp_path)))
    (tmp_path / "model.py").write_text((ROOT / "sagemaker" / "vllm_format.py").read_text())
    found = importlib.util.spec_from_file_location("vllm_model", tmp_path / "model.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_vllm_requests_and_answers_are_this_projects(formatter: Any) -> None:
    asked = {"prompt": "It", "max_length": 20, "stream": True, "request_id": "r", "keep": 3, "seed": None}
    made = formatter.request(asked)
    assert made["prompt"] == "It" and made["max_tokens"] == 20 and made["truncate_prompt_tokens"] == 44
    assert made["temperature"] == 1.3 and made["stream_options"] == {"include_usage": True}
    assert not {"keep", "max_length", "seed"} & set(made)
    assert formatter.request({"prompt": "It", "max_tokens": 5000})["max_tokens"] == 48

    def chunk(**values: Any) -> str:
        return "data: " + json.dumps({"id": "cmpl-r", "object": "text_completion", **values}) + "\n\n"

    pieces = [
        chunk(choices=[{"index": 0, "text": " was", "finish_reason": None}]),
        chunk(choices=[{"index": 0, "text": " “", "finish_reason": "length"}]),
        chunk(choices=[], usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}),
        "data: [DONE]\n\n",
    ]
    wire = "".join(formatter.answer(piece) + "\n" for piece in pieces).encode()
    from endpoint import lines

    messages = list(lines([wire]))
    assert [m["type"] for m in messages] == ["started", "token", "token", "complete"]
    assert [m.get("seq") for m in messages[1:3]] == [0, 1] and messages[2]["text"] == " “"
    assert messages[-1]["finish_reason"] == "length" and messages[-1]["usage"]["completion_tokens"] == 2
    whole = formatter.answer(
        {"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}
    )
    assert whole["generated_text"] == "x" and whole["finish_reason"] == "stop"
    refused = formatter.answer({"error": {"message": "too long", "code": 400, "param": "prompt"}})
    assert refused["error"]["type"] == "invalid_request_error"


def test_vllm_writes_in_one_style_and_never_its_control_ids(formatter: Any) -> None:
    made = formatter.request({"prompt": "It", "style": " birch "})
    assert made["prompt"] == "<|birch|>It" and made["logit_bias"] == {"300": -100, "301": -100}
    for style in ("austen", "ash:0.5,birch:0.5"):
        with pytest.raises(ValueError, match="this model has: ash, birch"):
            formatter.request({"prompt": "It", "style": style})
    (Path(formatter.__file__).parent / "generation_config.json").write_text("{}")
    assert "logit_bias" not in formatter.request({"prompt": "It"})


def test_vllm_gives_the_prompt_with_the_text_on_request(formatter: Any) -> None:
    assert formatter.request({"prompt": "It", "return_full_text": True})["echo"] is True
    for body in ({}, {"return_full_text": False}, {"return_full_text": None}):
        assert not {"echo", "return_full_text"} & set(formatter.request({"prompt": "It", **body}))
    with pytest.raises(ValueError, match="return_full_text: not together with a style"):
        formatter.request({"prompt": "It", "style": "birch", "return_full_text": True})


def test_vllm_samples_as_the_folder_recommends(tmp_path: Path) -> None:
    from config import GenerationParams

    usual = GenerationParams()
    assert realtime.vllm_settings(tmp_path)["defaults"]["temperature"] == usual.temperature
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.4, "top_k": 0, "max_new_tokens": 9}')
    settings = realtime.vllm_settings(tmp_path)
    given = settings["defaults"]
    assert (given["temperature"], given["top_k"], given["max_tokens"], given["top_p"]) == (0.4, 0, 9, usual.top_p)
    assert settings["names"]["min_p"] == "min_p" and not {"keep", "style"} & set(settings["names"])
