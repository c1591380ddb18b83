"""The SAM template: cfn-lint, the transform, and what neither of them looks at."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from local_stack import ROUTES, STAGE, TIMEOUTS

from support.helpers import ROOT

yaml = pytest.importorskip("yaml", reason="needs PyYAML: pip install -r requirements-aws.txt")
TEMPLATE = ROOT / "lambda" / "template.yaml"


class Loader(yaml.SafeLoader):
    pass


def tagged(loader: Any, suffix: str, node: Any) -> Any:
    kinds = {yaml.ScalarNode: loader.construct_scalar, yaml.SequenceNode: loader.construct_sequence}
    kind = next((make for shape, make in kinds.items() if isinstance(node, shape)), loader.construct_mapping)
    deep = {} if isinstance(node, yaml.ScalarNode) else {"deep": True}
    value = kind(node, **deep)
    if suffix == "GetAtt":
        value = value.split(".", 1)
    return {"Ref" if suffix == "Ref" else f"Fn::{suffix}": value}


Loader.add_multi_constructor("!", tagged)


@pytest.fixture(scope="module")
def template() -> dict[str, Any]:
    return yaml.load(TEMPLATE.read_text(), Loader)


def of(template: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    return {name: body for name, body in template["Resources"].items() if body["Type"] == kind}


def test_cfn_lint_is_clean() -> None:
    pytest.importorskip("cfnlint", reason="needs cfn-lint: pip install -r requirements-aws.txt")
    code = "import sys; from cfnlint.runner import main; sys.argv[0] = 'cfn-lint'; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, TEMPLATE], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_transform_accepts_it(template: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    samtranslator = pytest.importorskip("samtranslator", reason="needs aws-sam-translator, which cfn-lint brings")
    from samtranslator.translator.transform import transform

    body = json.loads(json.dumps(template))
    for function in of(body, "AWS::Serverless::Function").values():
        if "CodeUri" in function["Properties"]:
            function["Properties"]["CodeUri"] = "s3://bucket/relay.zip"
    made = transform(body, {}, managed_policy_loader=None, feature_toggle=None)
    functions = of(made, "AWS::Lambda::Function")
    assert set(functions) == {"AuthorizerFunction", "RouterFunction", "WorkerFunction", "ModelFunction"}
    assert samtranslator
    config = of(made, "AWS::Lambda::EventInvokeConfig")
    assert [entry["Properties"]["MaximumRetryAttempts"] for entry in config.values()] == [0]
    roles = of(made, "AWS::IAM::Role")
    assert set(roles) == set(of(template, "AWS::IAM::Role")), "the transform must not add roles of its own"


def test_only_what_cloudformation_reads() -> None:
    assert not re.search(r"(:|-)\s+[&*][A-Za-z]", TEMPLATE.read_text()), "CloudFormation refuses YAML aliases"


def test_routes_and_the_authorizer_on_connect(template: dict[str, Any]) -> None:
    routes = {body["Properties"]["RouteKey"]: body["Properties"] for body in of(template, "AWS::ApiGatewayV2::Route").values()}  # fmt: skip
    assert set(routes) == set(ROUTES)
    assert routes["$connect"]["AuthorizationType"] == "CUSTOM"
    assert routes["$connect"]["AuthorizerId"] == {"Ref": "Authorizer"}
    assert all("AuthorizationType" not in body for key, body in routes.items() if key != "$connect")
    deployment = template["Resources"]["Deployment"]
    assert set(deployment["DependsOn"]) == set(of(template, "AWS::ApiGatewayV2::Route"))
    assert template["Resources"]["Api"]["Properties"]["RouteSelectionExpression"] == "$request.body.action"
    assert "Tokens" not in template["Parameters"], "tokens do not belong into a stack's parameters"


def test_timeouts_fit_the_gateway(template: dict[str, Any]) -> None:
    for body in of(template, "AWS::ApiGatewayV2::Integration").values():
        assert body["Properties"]["TimeoutInMillis"] <= 29_000
    functions = of(template, "AWS::Serverless::Function")
    for name, seconds in TIMEOUTS.items():
        properties = functions[f"{name.title()}Function"]["Properties"]
        assert properties["Timeout"] == seconds, "the local stack must run it as AWS does"
        assert properties["Handler"] == f"relay.{name}"
        assert seconds <= (900 if name == "worker" else 29)
    assert functions["ModelFunction"]["Properties"]["Timeout"] == TIMEOUTS["worker"]
    for name in ("WorkerFunction", "ModelFunction"):
        reserved = functions[name]["Properties"]["ReservedConcurrentExecutions"]
        assert reserved["Fn::If"][:2] == ["Reserves", {"Ref": "Workers"}], "an account may have nothing to reserve"


def test_a_text_without_a_worker_is_not_lost(template: dict[str, Any]) -> None:
    """Throttled events are queued, retried up to their greatest age, and then sent to the on-failure destination
    (https://docs.aws.amazon.com/lambda/latest/dg/invocation-async-error-handling.html)."""
    (config,) = of(template, "AWS::Lambda::EventInvokeConfig").values()
    events = config["Properties"]
    assert events["MaximumRetryAttempts"] == 0 and events["MaximumEventAgeInSeconds"] == 60
    assert events["DestinationConfig"]["OnFailure"] == {"Destination": {"Fn::GetAtt": ["RouterFunction", "Arn"]}}
    (policy,) = of(template, "AWS::IAM::Policy").values()
    (statement,) = policy["Properties"]["PolicyDocument"]["Statement"]
    assert statement["Action"] == "lambda:InvokeFunction" and policy["Properties"]["Roles"] == [{"Ref": "WorkerRole"}]
    assert config["DependsOn"] == "WorkerDestination", "the service tries the destination when it is set"
    alarms = {body["Properties"]["MetricName"] for body in of(template, "AWS::CloudWatch::Alarm").values()}
    assert "AsyncEventsDropped" in alarms


def test_the_models_url_streams_and_may_be_called(template: dict[str, Any]) -> None:
    """A URL needs both permissions since October 2025 (https://docs.aws.amazon.com/lambda/latest/dg/urls-auth.html)."""
    (url,) = of(template, "AWS::Lambda::Url").values()
    assert url["Properties"]["InvokeMode"] == "RESPONSE_STREAM" and url["Condition"] == "InLambda"
    granted = [body["Properties"] for body in of(template, "AWS::Lambda::Permission").values() if body.get("Condition")]
    assert {body["Action"] for body in granted} == {"lambda:InvokeFunctionUrl", "lambda:InvokeFunction"}
    assert "Cors" not in url["Properties"], "the function decides which pages may read its answers"


def test_a_budget_is_watched_where_somebody_is_told(template: dict[str, Any]) -> None:
    (budget,) = of(template, "AWS::Budgets::Budget").values()
    assert budget["Condition"] == "HasBudget" and budget["Properties"]["Budget"]["TimeUnit"] == "MONTHLY"


def test_stage_is_throttled_and_named_as_the_permissions(template: dict[str, Any]) -> None:
    stage = template["Resources"]["Stage"]["Properties"]
    assert stage["StageName"] == STAGE
    assert {"ThrottlingRateLimit", "ThrottlingBurstLimit"} <= set(stage["DefaultRouteSettings"])
    assert TEMPLATE.read_text().count(f"${{Api}}/{STAGE}/POST/@connections/*") == 2


def test_roles_name_actions_and_resources(template: dict[str, Any]) -> None:
    wanted = {
        "AuthorizerRole": {"logs:CreateLogStream", "logs:PutLogEvents", "dynamodb:GetItem"},
        "RouterRole": {"logs:CreateLogStream", "logs:PutLogEvents", "dynamodb:PutItem", "dynamodb:UpdateItem",
                       "dynamodb:Query", "lambda:InvokeFunction", "execute-api:ManageConnections"},
        "WorkerRole": {"logs:CreateLogStream", "logs:PutLogEvents", "dynamodb:GetItem", "dynamodb:UpdateItem",
                       "dynamodb:PutItem", "dynamodb:Query", "sagemaker:InvokeEndpoint", "execute-api:ManageConnections"},
    }  # fmt: skip
    for name, body in of(template, "AWS::IAM::Role").items():
        properties = body["Properties"]
        assert "ManagedPolicyArns" not in properties
        found = set()
        for policy in properties["Policies"]:
            for statement in policy["PolicyDocument"]["Statement"]:
                if "Fn::If" in statement:
                    assert statement["Fn::If"][0] == "HasKey" and "kms:Decrypt" in statement["Fn::If"][1]["Action"]
                    continue
                actions = statement["Action"]
                found |= set([actions] if isinstance(actions, str) else actions)
                assert statement["Resource"] != "*" and isinstance(statement["Resource"], dict)
        assert found == wanted[name] and not any("*" in action for action in found)
    for name, body in of(template, "AWS::Serverless::Function").items():
        role = "WorkerRole" if name == "ModelFunction" else name.replace("Function", "Role")
        assert body["Properties"]["Role"] == {"Fn::GetAtt": [role, "Arn"]}


def test_every_function_logs_where_logs_expire(template: dict[str, Any]) -> None:
    groups = of(template, "AWS::Logs::LogGroup")
    assert all("RetentionInDays" in body["Properties"] for body in groups.values())
    used = {body["Properties"]["LoggingConfig"]["LogGroup"]["Ref"] for body in of(template, "AWS::Serverless::Function").values()}  # fmt: skip
    assert used == set(groups)
    stored = [body for body in template["Resources"].values() if body["Type"] in ("AWS::Logs::LogGroup", "AWS::DynamoDB::Table")]  # fmt: skip
    assert all(body["DeletionPolicy"] == "Delete" for body in stored), "deleting the stack must leave nothing behind"


def test_environment_is_what_the_handlers_read(template: dict[str, Any]) -> None:
    source = "".join((ROOT / "lambda" / name).read_text() for name in ("relay.py", "wire.py", "writer.py"))
    read = set(re.findall(r'(?:get|environ\.get)\("([A-Z_]+)"', source))
    given = set(template["Globals"]["Function"]["Environment"]["Variables"])
    for body in of(template, "AWS::Serverless::Function").values():
        given |= set(body["Properties"].get("Environment", {}).get("Variables", {}))
    assert given <= read, "a variable that nobody reads"
    assert read - given == {"MANAGEMENT_ENDPOINT", "AWS_ENDPOINT_URL_APIGATEWAYMANAGEMENTAPI", "MODEL_FOLDER"}


def test_limits_are_those_of_the_template(template: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """limits.py holds the numbers; the template's defaults and the settings of an empty environment are the same."""
    import limits
    import wire

    variables, parameters = template["Globals"]["Function"]["Environment"]["Variables"], template["Parameters"]
    names = ("MAX_TOKENS", "MAX_SAMPLES", "MAX_PROMPT_BYTES", "MAX_ACTIVE", "FLUSH_MS", "STOP_POLL_MS", "SILENCE_S")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        value = variables[name]
        default = parameters[value["Ref"]]["Default"] if isinstance(value, dict) else value
        assert float(default) == getattr(limits, name), name
    read = wire.RelaySettings.read()
    found = (read.max_tokens, read.max_samples, read.max_prompt_bytes, read.max_active)
    found += (read.flush_s * 1000, read.poll_s * 1000, read.silence_s)
    assert dict(zip(names, found, strict=True)) == {name: getattr(limits, name) for name in names}


def test_alarms_watch_metrics_that_exist(template: dict[str, Any]) -> None:
    source = (ROOT / "lambda" / "relay.py").read_text()
    alarms = of(template, "AWS::CloudWatch::Alarm").values()
    assert len(alarms) >= 3
    for body in alarms:
        if body["Properties"]["Namespace"] == "VictorianGenerator":
            assert f'"{body["Properties"]["MetricName"]}"' in source
    dashboard = template["Resources"]["Dashboard"]["Properties"]["DashboardBody"]["Fn::Sub"][0]
    widgets = json.loads(re.sub(r"\$\{[^}]+\}", "x", dashboard))["widgets"]
    assert len(widgets) == 6
