"""Canaries of aliases: begun, finished, aborted, and looked at. Source: docs/how-to/canary.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from isthmus.arrays import Array
from isthmus.artifacts.alias import Alias
from isthmus.artifacts.canary import Canary, CanaryRule
from isthmus.errors import RegistryError
from isthmus.http.tls import TlsTrust
from isthmus.registry import Registry, open_registry
from isthmus.registry.aliases import PROD, AliasSigner, Move
from isthmus.routing.state import TrialState
from isthmus.settings import RegistrySettings
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.publish import PromoteResult, run_missing
from isthmus_tools.usecases.routes import RouterView
from isthmus_tools.usecases.signing import sign_version

# A look costs the router less than a request does.
_LOOK_S = 5.0


@dataclass(frozen=True, kw_only=True)
class CanaryRequest:
    """A version, NAME:VERSION, that a share of the alias's callers shall get; or another share of the present canary.

    With `expected`, only if the alias's counter is still this one. `arrays` as for `PublishRequest`.
    """

    model: str
    registry: RegistrySettings
    share: float
    rule: CanaryRule = field(default_factory=CanaryRule)
    alias: str = PROD
    expected: int | None = None
    signer: AliasSigner | None = None
    arrays: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CanaryEnd:
    """The end of the canary of an alias: finished, the alias means it from now on; else it keeps its version.

    `model` is NAME, or NAME:VERSION where the canary must be this version.
    """

    model: str
    registry: RegistrySettings
    is_finished: bool
    alias: str = PROD
    expected: int | None = None
    signer: AliasSigner | None = None


@dataclass(frozen=True, kw_only=True)
class CanaryQuestion:
    """The canaries of the model `name`; with `router`, a URL, also what its requests show. `api_key` as of `Client`."""

    name: str
    registry: RegistrySettings
    router: str = ""
    trust: TlsTrust | None = None
    api_key: str | None = None


@dataclass(frozen=True)
class CanaryReport:
    """The aliases of a model that have a canary, and the trials of a router."""

    aliases: Sequence[Alias]
    trials: Sequence[TrialState]


def begin_canary(request: CanaryRequest, progress: Progress = silent) -> PromoteResult:
    """Begin the canary of an alias, or change share and rule of the one that it has: callers with it keep it then.

    Segments that have never run are run first.

    Raises:
        ModelError: a segment does not run; the alias did not move.
        AliasMoved: somebody else moved the alias meanwhile, or its counter is not `expected`.
        RegistryError: unknown version, or the alias means it already; no alias to share with.
    """
    store = open_registry(request.registry)
    tried = store.resolve(request.model)
    present = store.alias(tried.name, request.alias)
    if present.digest == tried.digest or present.number == tried.version:
        raise RegistryError(
            f"{request.alias} means {tried.name}:{tried.version} already, for all callers",
            registry=store.url,
            hint="name another version as the canary",
        )
    runs = run_missing(store, request.registry, tried.digest, request.arrays, progress)
    if request.signer is not None:
        sign_version(store, tried, request.signer.key)
    goes_on = present.canary is not None and present.canary.digest == tried.digest
    # The move below is the present counter's successor, or fails.
    began = present.canary.began if goes_on and present.canary is not None else present.counter + 1
    canary = Canary(int(tried.version), tried.digest, request.share, began, request.rule)
    return PromoteResult(_move(store, present, present.number, canary, request.expected, request.signer), runs)


def end_canary(request: CanaryEnd) -> Move:
    """Finish or abort the canary of an alias.

    Raises:
        AliasMoved: somebody else moved the alias meanwhile, such as a router that rolled the canary back.
        RegistryError: the alias has no canary, or another one.
    """
    store = open_registry(request.registry)
    name, _, version = request.model.partition(":")
    present = store.alias(name, request.alias)
    if present.canary is None or version not in ("", str(present.canary.version)):
        has = "no canary" if present.canary is None else f"the canary {name}:{present.canary.version}"
        raise RegistryError(
            f"{name}:{request.alias} has {has}",
            registry=store.url,
            hint=f"a router may have rolled it back: isthmus canary {name}, isthmus audit",
        )
    # An abort leaves the version, so that it is no step for a rollback to go back to.
    number = str(present.canary.version) if request.is_finished else present.number
    return _move(store, present, number, None, request.expected, request.signer)


def report_canaries(question: CanaryQuestion) -> CanaryReport:
    """The canaries of a model in the registry, and their trials in a router.

    Raises:
        Missing: no such model.
        HopError: the router does not answer.
    """
    store = open_registry(question.registry)
    # A mistyped name has no canary either, and a pipeline would take that for the end of a trial.
    store.versions(question.name)
    documents = [store.alias(question.name, alias) for alias in store.aliases(question.name)]
    trials: Sequence[TrialState] = ()
    if question.router:
        view = RouterView(question.router, timeout_s=_LOOK_S, trust=question.trust, api_key=question.api_key)
        trials = view.state().canaries
    return CanaryReport(
        [document for document in documents if document.canary is not None],
        [trial for trial in trials if trial.model == question.name],
    )


def _move(
    store: Registry,
    present: Alias,
    number: str,
    canary: Canary | None,
    expected: int | None,
    signer: AliasSigner | None,
) -> Move:
    # Never without a counter: the canary was judged by the document that was read here.
    counter = present.counter if expected is None else expected
    return store.move_alias(present.name, present.alias, number, canary=canary, expected=counter, signer=signer)
