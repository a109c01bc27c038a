"""deploy/network-policies.yml: documents that Kubernetes takes, and the connections that they let through."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

import kubernetes_validate
import pytest
import yaml

from isthmus_tools.engine.stack import read_stack
from support.paths import ROOT

POLICIES = list(yaml.safe_load_all((ROOT / "deploy" / "network-policies.yml").read_text()))
FUNCTIONS = sorted(read_stack(ROOT / "stack.yml", {}).functions)
NATS = list(yaml.safe_load_all((ROOT / "deploy" / "nats.yml").read_text()))
Pod = tuple[str, Mapping[str, str]]

GATEWAY: Pod = ("openfaas", {"app": "gateway"})
QUEUE: Pod = ("isthmus", {"app": "nats"})
DNS: Pod = ("kube-system", {"k8s-app": "kube-dns"})
INGRESS: Pod = ("ingress-nginx", {"app": "controller"})
PROMETHEUS: Pod = ("openfaas", {"app": "prometheus"})
STRANGER: Pod = ("openfaas-fn", {"faas_function": "stranger"})
NEIGHBOUR: Pod = ("default", {"app": "shop"})


def function(name: str) -> Pod:
    return "openfaas-fn", {"faas_function": name}


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes labels; the operator In alone is used."""
    listed = {e["key"]: e["values"] for e in selector.get("matchExpressions", ()) if e["operator"] == "In"}
    assert len(listed) == len(selector.get("matchExpressions", ()))
    wanted = {key: [value] for key, value in selector.get("matchLabels", {}).items()} | listed
    return all(labels.get(key) in values for key, values in wanted.items())


def peer_takes(peer: Mapping[str, Any], home: str, other: Pod | str) -> bool:
    """Whether a peer of a rule in the namespace `home` is that pod, or that address."""
    if isinstance(other, str):
        address, block = ipaddress.ip_address(other), peer.get("ipBlock", {})
        networks = [ipaddress.ip_network(text) for text in block.get("except", ())]
        return (
            bool(block) and address in ipaddress.ip_network(block["cidr"]) and not any(address in n for n in networks)
        )
    namespace, labels = other
    if "ipBlock" in peer:
        return False
    names = {"kubernetes.io/metadata.name": namespace}
    at_home = selects(peer["namespaceSelector"], names) if "namespaceSelector" in peer else namespace == home
    return at_home and selects(peer.get("podSelector", {}), labels)


def lets(direction: str, pod: Pod, other: Pod | str, port: int) -> bool:
    """Whether the policies of a pod let a connection in or out; without any that selects the pod, all are."""
    namespace, labels = pod
    side = {"Ingress": "from", "Egress": "to"}[direction]
    own = [
        policy["spec"]
        for policy in POLICIES
        if policy["metadata"]["namespace"] == namespace
        and direction in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], labels)
    ]
    rules = [rule for spec in own for rule in spec.get(direction.lower(), ())]
    return not own or any(
        any(p["port"] == port for p in rule["ports"]) and any(peer_takes(p, namespace, other) for p in rule[side])
        for rule in rules
    )


def connects(source: Pod, target: Pod | str, port: int) -> bool:
    is_in = isinstance(target, str) or lets("Ingress", target, source, port)
    return lets("Egress", source, target, port) and is_in


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["metadata"]["name"])
def test_kubernetes_takes_each_policy(policy: dict[str, Any]) -> None:
    kubernetes_validate.validate(policy, kubernetes_validate.latest_version(), strict=True)


def test_a_policy_with_a_misspelt_field_would_be_refused() -> None:
    wrong = {**POLICIES[0], "spec": {**POLICIES[0]["spec"], "policyType": ["Ingress"]}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        *((GATEWAY, function(name), 8080) for name in FUNCTIONS),
        *((PROMETHEUS, function(name), 8081) for name in FUNCTIONS),
        *((function(name), DNS, 53) for name in FUNCTIONS),
        *((function(name), "52.218.1.2", 443) for name in FUNCTIONS),
        (function("router"), GATEWAY, 8080),
        (function("trigger"), GATEWAY, 8080),
        (function("trigger"), QUEUE, 4222),
        (INGRESS, GATEWAY, 8080),
    ],
)
def test_what_the_functions_need_goes_through(source: Pod, target: Pod | str, port: int) -> None:
    assert connects(source, target, port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        *((NEIGHBOUR, function(name), 8080) for name in FUNCTIONS),
        *((STRANGER, function(name), 8080) for name in FUNCTIONS),
        *((INGRESS, function(name), 8080) for name in FUNCTIONS),
        *((function(name), "169.254.169.254", 80) for name in FUNCTIONS),
        *((function(name), "10.0.0.7", 443) for name in FUNCTIONS),
        *((function(name), "52.218.1.2", 80) for name in FUNCTIONS),
        (function("router"), function("cloud-tail"), 8080),
        (function("cloud-tail"), GATEWAY, 8080),
        (function("edge-head"), GATEWAY, 8080),
        (function("router"), QUEUE, 4222),
        (STRANGER, GATEWAY, 8080),
        (NEIGHBOUR, GATEWAY, 8080),
    ],
)
def test_nothing_else_goes_through(source: Pod, target: Pod | str, port: int) -> None:
    assert not connects(source, target, port)


def test_the_queue_is_that_of_the_manifest() -> None:
    (pods,) = (d["spec"]["template"]["metadata"]["labels"] for d in NATS if d["kind"] == "StatefulSet")
    assert selects({"matchLabels": dict(QUEUE[1])}, pods)
    assert {d["metadata"]["namespace"] for d in NATS if d["kind"] != "Namespace"} == {QUEUE[0]}
