"""The scaling of one endpoint's instances by concurrent requests.

An endpoint whose variant is a scalable target refuses another instance type, and an update sets the number of instances
back: so the target is taken away before an update and registered again after it
(https://docs.aws.amazon.com/sagemaker/latest/dg/endpoint-scaling.html).
"""

from __future__ import annotations

from typing import Any

VARIANT = "primary"
Call = tuple[str, dict[str, Any]]


def target(endpoint: str) -> dict[str, str]:
    """What identifies the endpoint's variant to Application Auto Scaling."""
    return {
        "ServiceNamespace": "sagemaker",
        "ResourceId": f"endpoint/{endpoint}/variant/{VARIANT}",
        "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
    }


def calls(endpoint: str, least: int, most: int, concurrency: float) -> list[Call]:
    """The calls that make the instances, `least` to `most`, follow the number of concurrent requests."""
    metric = {"PredefinedMetricType": "SageMakerVariantConcurrentRequestsPerModelHighResolution"}
    policy = {
        "TargetValue": concurrency,
        "PredefinedMetricSpecification": metric,
        "ScaleInCooldown": 300,
        "ScaleOutCooldown": 60,
    }
    named = {"PolicyName": f"{endpoint}-concurrency", "PolicyType": "TargetTrackingScaling"}
    return [
        ("register_scalable_target", {**target(endpoint), "MinCapacity": least, "MaxCapacity": most}),
        ("put_scaling_policy", {**target(endpoint), **named, "TargetTrackingScalingPolicyConfiguration": policy}),
    ]


def found(client: Any, endpoint: str) -> list[Call]:
    """The calls that would make the present scaling again; empty if there is none."""
    which = target(endpoint)
    listed = client.describe_scalable_targets(
        ServiceNamespace="sagemaker", ResourceIds=[which["ResourceId"]], ScalableDimension=which["ScalableDimension"]
    )["ScalableTargets"]
    if not listed:
        return []
    limits = {name: listed[0][name] for name in ("MinCapacity", "MaxCapacity")}
    made: list[Call] = [("register_scalable_target", {**which, **limits})]
    policies = client.describe_scaling_policies(**which)["ScalingPolicies"]
    kept = ("PolicyName", "PolicyType", "TargetTrackingScalingPolicyConfiguration", "StepScalingPolicyConfiguration")
    for policy in policies:
        made.append(("put_scaling_policy", {**which, **{name: policy[name] for name in kept if name in policy}}))
    return made


def remove(client: Any, endpoint: str) -> None:
    """Delete the variant's policies and deregister it."""
    for policy in client.describe_scaling_policies(**target(endpoint))["ScalingPolicies"]:
        client.delete_scaling_policy(PolicyName=policy["PolicyName"], **target(endpoint))
    client.deregister_scalable_target(**target(endpoint))


def apply(client: Any, made: list[Call]) -> None:
    for name, parameters in made:
        getattr(client, name)(**parameters)
