"""Options that several commands share, their checks, and the settings read from the environment."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from isthmus.artifacts.cuts import SYNTAX
from isthmus.errors import RequestMalformed
from isthmus.security.caller_keys import KEY_PREFIX
from isthmus.settings import MAX_THREADS, RegistrySettings
from isthmus.units import parse_duration
from isthmus_tools.budget import Budget
from isthmus_tools.cli.completion import complete_aliases, complete_cuts, complete_models
from isthmus_tools.cli.environment import CACHE_DIR
from isthmus_tools.figures.style import SUFFIXES

# Tokens of identity providers have some thousand bytes.
_MAX_KEY_BYTES = 16 * 2**10
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
RunThreads = Annotated[
    int, typer.Option(help="Threads of one run; 0 takes the CPUs there are.", min=0, max=MAX_THREADS)
]
RegistryOption = Annotated[
    str,
    typer.Option(
        "--registry",
        envvar="ISTHMUS_REGISTRY",
        help="Where bundles live: a folder, s3://BUCKET/PREFIX, gs://…, az://… or hdfs://….",
    ),
]
ModelArgument = Annotated[
    str, typer.Argument(help="NAME or NAME:VERSION of a bundle in the registry.", autocompletion=complete_models)
]
Alias = Annotated[str, typer.Option(help="Let this alias mean the new version.", autocompletion=complete_aliases)]
ApiKey = Annotated[
    Path | None,
    typer.Option(
        "--api-key",
        metavar="FILE",
        help="A file with the key for the router; by default the environment's ISTHMUS_API_KEY.",
    ),
]
DropPlan = Annotated[
    bool,
    typer.Option(
        "--drop-plan",
        help="Move the alias even where the version that it means has a plan and the new one would have none.",
    ),
]
SignWith = Annotated[
    Path | None,
    typer.Option(
        "--sign-with",
        envvar="ISTHMUS_SIGN_WITH",
        help="Sign with the key in this file: what functions with trusted keys demand.",
    ),
]
TrustedKeys = Annotated[
    Path | None,
    typer.Option(
        envvar="ISTHMUS_TRUSTED_KEYS",
        help="Demand signatures as a function with this keyring does: of the version, and of an alias that is named.",
    ),
]
ExpiresDays = Annotated[
    float,
    typer.Option(min=0, max=36_500, help="Validity of the signed alias from now on, in days; 0 is without end."),
]
TimeLimit = Annotated[
    str, typer.Option(help="Begin nothing more after this time; what was left out is told. 0s is no limit.")
]
Tensors = Annotated[list[str] | None, typer.Option(help="An input tensor, NAME=FILE.npy; once for each input.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        help="An input's shape: NAME=1x3x320x640, once per input. ONNX and .pt2: the sizes that its free dimensions are"
        " counted for. For package.module:factory, NAME is a parameter of forward, traced with float32 zeros of that"
        " shape;"
        " a dimension that is to stay free is named, with commas between: NAME=batch,3,320,640 or ids=batch:4,seq:128."
    ),
]
Examples = Annotated[
    list[Path] | None,
    typer.Option(
        help="Example inputs: an .npz file with an array for each input, or NAME=FILE.npy; once per file. They give"
        " shapes as --shape does, and values where shapes depend on those; package.module:factory is traced with them,"
        " and takes their dtypes: inputs of whole numbers need one."
    ),
]
EdgeSlowdown = Annotated[
    float | None,
    typer.Option(help="An edge so many times slower than this machine: 8 is an eighth of one CPU.", metavar="N"),
]
EdgeCpus = Annotated[
    float | None, typer.Option(help="The same, as a share of one CPU: 0.25 is --edge-slowdown 4.", metavar="SHARE")
]
Sweep = Annotated[
    bool, typer.Option("--sweep", help="Also map the best over bandwidth by edge slowdown and by round trip.")
]
CheckedCells = Annotated[
    int,
    typer.Option(
        "--check",
        help="With --sweep of a slow --local edge: measure so many cells of the map.",
        min=0,
        metavar="N",
    ),
]
PlanPicture = Annotated[
    Path | None, typer.Option(help="Draw the plan to this .png or .svg file; with --sweep, the map instead.")
]
PICTURES = SUFFIXES
DEFAULT_REGISTRY = ".isthmus/registry"


def cut_option(purpose: str) -> Any:
    """The option --cut of every command, in the one form of cuts."""
    return typer.Option("--cut", metavar="CUT", help=f"{purpose} CUT: {SYNTAX}.", autocompletion=complete_cuts)


# The local engine's folder of secrets: commands read S3 keys there as the functions of `isthmus up` do.
ENGINE_SECRETS = ".isthmus/secrets"
# More than a function's: commands read whole models, on a disk that no pod's memory bounds.
_CACHE_BYTES = "8GiB"
Number = TypeVar("Number", int, float)


def registry_settings(registry: str, cache_dir: str = CACHE_DIR, trusted_keys: Path | None = None) -> RegistrySettings:
    """A command's registry settings: a function's variables of the environment, except for three defaults.

    Signatures are demanded with `trusted_keys` alone: commands read and make versions that nobody has signed yet.

    Raises:
        SettingsError: as for a function.
    """
    defaults = {"cache_dir": cache_dir, "cache_bytes": _CACHE_BYTES}
    if not Path(RegistrySettings.secrets_dir).is_dir():
        defaults["secrets_dir"] = ENGINE_SECRETS
    variables = {name: text for name, text in os.environ.items() if text.strip()}
    keyring = "none" if trusted_keys is None else str(trusted_keys)
    return RegistrySettings.from_env({**defaults, **variables, "registry": registry, "trusted_keys": keyring})


def stack_variables(registry: str) -> dict[str, str]:
    """Values for the ${…} of stack.yml: the environment, and the registry as commands understand it.

    A folder's path becomes absolute. The S3 server and region are the commands', from any of their variables. The
    router's watchdog gives a text ten minutes: nothing here ends a pod after Kubernetes' 30 s.

    Raises:
        SettingsError: `registry` is no address, or the environment's settings contradict each other.
    """
    from isthmus.registry import parse_address

    settings, folder = registry_settings(registry), parse_address(registry).folder
    servers = {
        "S3_ENDPOINT": settings.s3_endpoint,
        "S3_REGION": settings.s3_region,
        "GCS_ENDPOINT": settings.gcs_endpoint,
        "AZURE_ACCOUNT": settings.azure_account,
        "AZURE_BLOB_ENDPOINT": settings.azure_endpoint,
    }
    return {
        "ROUTER_EXEC_TIMEOUT": "605s",
        "ROUTER_WRITE_TIMEOUT": "610s",
        **os.environ,
        "ISTHMUS_REGISTRY": str(Path(folder).absolute()) if folder else registry,
        **{name: text for name, text in servers.items() if text},
    }


def in_registry(command: str, registry: str) -> str:
    """A command to run next, with the registry of this command where a default would name another."""
    if registry in (DEFAULT_REGISTRY, os.environ.get("ISTHMUS_REGISTRY")):
        return command
    return f"{command} --registry {shlex.quote(registry)}"


def signed(command: str, key: Path | None) -> str:
    """A command to run next, with the key of this command: a signed alias moves with a key alone."""
    return command if key is None else f"{command} --sign-with {shlex.quote(str(key))}"


def read_api_key(file: Path | None) -> str | None:
    """The key in a file, without the line break of editors; None without a file. Not an option: `ps` shows those.

    Raises:
        OSError: the file cannot be read.
        RequestMalformed: longer than any key, or the option is the key itself, which the error does not repeat.
    """
    if file is None:
        return None
    if file.name.startswith(KEY_PREFIX) and not file.exists():
        raise RequestMalformed(
            "--api-key is the name of a file that holds the key",
            option="--api-key",
            hint="the key itself goes into the variable ISTHMUS_API_KEY",
        )
    with file.open("rb") as f:
        data = f.read(_MAX_KEY_BYTES + 1)
    if len(data) > _MAX_KEY_BYTES:
        raise RequestMalformed(f"{file} has more than {_MAX_KEY_BYTES} bytes: it holds no key", option="--api-key")
    return data.decode("latin-1").strip()


def read_option(parse: Callable[[str], Number], option: str, text: str) -> Number:
    """The value of an option's text.

    Raises:
        RequestMalformed: the text does not parse; the message names the option.
    """
    try:
        return parse(text)
    except ValueError as e:
        raise RequestMalformed(f"{option}: {e}", option=option) from e


def edge_slowdown_of(slowdown: float | None, cpus: float | None) -> float | None:
    """The slowdown of --edge-slowdown or --edge-cpus; None without either.

    Raises:
        RequestMalformed: both, or a value out of range.
    """
    from isthmus_tools.engine.cpu_share import MAX_SLOWDOWN

    if slowdown is not None and cpus is not None:
        raise RequestMalformed("--edge-slowdown and --edge-cpus say the same: give one", option="--edge-cpus")
    if slowdown is not None and not 1 < slowdown <= MAX_SLOWDOWN:
        raise RequestMalformed(
            f"--edge-slowdown is {slowdown:g}; it is above 1 and at most {MAX_SLOWDOWN:g}", option="--edge-slowdown"
        )
    if cpus is not None and not 1 / MAX_SLOWDOWN <= cpus < 1:
        raise RequestMalformed(
            f"--edge-cpus is {cpus:g}; it is at least {1 / MAX_SLOWDOWN:g} and below 1", option="--edge-cpus"
        )
    return slowdown if cpus is None else 1 / cpus


def budget_of(time_limit: str) -> Budget:
    """The budget of --time-limit, from now on.

    Raises:
        RequestMalformed: the text is no duration.
    """
    return Budget(read_option(parse_duration, "--time-limit", time_limit) or math.inf)


def refuse_senseless(model: str, options: Mapping[str, object]) -> None:
    """Refuse options that were given for a language model and are for other models.

    Raises:
        RequestMalformed: names the options.
    """
    if senseless := [option for option, value in options.items() if value]:
        raise RequestMalformed(
            f"{model} is a language model, which takes no {', '.join(senseless)}",
            options=senseless,
            hint="its cuts lie between layers, whatever the length of a text",
        )


def check_output(path: Path, option: str, endings: Sequence[str] = ()) -> None:
    """Check that a file can be written at `path`, before its content is computed.

    Raises:
        RequestMalformed: `path` ends in none of `endings`, is a folder, or its folder is missing or not writable.
    """
    folder = path.absolute().parent
    if endings and path.suffix.lower() not in endings:
        why = f"its name ends in {' or '.join(endings)}"
    elif not folder.is_dir():
        why = f"there is no folder {folder}"
    elif path.is_dir():
        why = "that is a folder; name a file in it"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        why = "it cannot be written: permission denied"
    else:
        return
    raise RequestMalformed(f"{option} is {path}; {why}", option=option, path=str(path))
