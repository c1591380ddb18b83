#!/usr/bin/env bash
# Expected: as in Application Auto Scaling's API reference, "Deregistering a scalable target deletes the scaling policies
# that are associated with it", so a deployment that lowers its maximum to a fixed number only has to deregister.
# Seen with moto 5.2.5: the target is gone and its policy stays, so a test that looks for leftover policies blames the code.
# (sagemaker/autoscaling.py deletes each policy by name before it deregisters, which is right in both.)
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check "moto==5.2.5" "boto3==1.44.5"
AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=x AWS_DEFAULT_REGION=eu-west-1 "$place/venv/bin/python" - <<'PY'
import boto3
from moto import mock_aws

which = {
    "ServiceNamespace": "dynamodb",
    "ResourceId": "table/letters",
    "ScalableDimension": "dynamodb:table:ReadCapacityUnits",
}
with mock_aws():
    scaling = boto3.client("application-autoscaling")
    said = scaling.meta.service_model.operation_model("DeregisterScalableTarget").documentation
    assert "deletes the scaling policies" in said, said
    scaling.register_scalable_target(**which, MinCapacity=1, MaxCapacity=3)
    scaling.put_scaling_policy(
        **which,
        PolicyName="follow",
        PolicyType="TargetTrackingScaling",
        TargetTrackingScalingPolicyConfiguration={
            "TargetValue": 70.0,
            "PredefinedMetricSpecification": {"PredefinedMetricType": "DynamoDBReadCapacityUtilization"},
        },
    )
    scaling.deregister_scalable_target(**which)
    targets = scaling.describe_scalable_targets(ServiceNamespace="dynamodb")["ScalableTargets"]
    policies = scaling.describe_scaling_policies(ServiceNamespace="dynamodb")["ScalingPolicies"]
    print("documented:", "deletes the scaling policies that are associated with it")
    print("moto 5.2.5: targets", len(targets), "policies", len(policies))
    assert (len(targets), len(policies)) == (0, 1), "moto has changed: the surprise is gone"
PY
