"""The demo's model in the demo's own registry, calibrated at its cut."""

from __future__ import annotations

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.fidelity import Fidelity, read_fidelity
from isthmus.errors import CalibrationError
from isthmus.registry import Registry, Resolved, open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.calibrate import CalibrateRequest, calibrate
from isthmus_tools.usecases.model_import import ImportRequest, import_model
from isthmus_tools.zoo.calibration import shipped_calibration
from isthmus_tools.zoo.photos import varied_photos

MODEL, CUT = "efficientnet-lite0", "31"
# Without the tables that come with the model: seconds, and enough for a first impression.
_LEARNED_FROM = 48


def prepare(registry: RegistrySettings, name: str = MODEL, cut: str = CUT, progress: Progress = silent) -> Resolved:
    """The calibrated model in the demo's registry: imported at first, with the calibration that comes with it.

    Where that is of another export of the model, one is learned of few inputs.

    Raises:
        ModelError: the model's packages are not installed.
        RegistryError: the registry cannot be read or written.
    """
    import_model(ImportRequest(model=name, registry=registry, cuts=[cut], if_absent=True), progress)
    store = open_registry(registry)
    model = store.resolve(name)
    if fidelity_at(store, model.bundle, cut) is not None:
        return model
    if (shipped := shipped_calibration(model.bundle)) is not None:
        store.publish(*shipped, alias="prod")
    else:
        progress(f"learning codecs at the cut {cut} from {_LEARNED_FROM} inputs")
        photos = varied_photos()
        learn = CalibrateRequest(
            model=name,
            files=photos,
            data="photos",
            registry=registry,
            cuts=[cut],
            inputs=_LEARNED_FROM,
        )
        calibrate(learn, progress)
    return store.resolve(name)


def fidelity_at(store: Registry, bundle: Bundle, cut: str) -> Fidelity | None:
    """The bundle's fidelity, if it was measured at the cut."""
    try:
        fidelity = read_fidelity(bundle, store.blob)
    except CalibrationError:
        return None
    return fidelity if fidelity is not None and cut in fidelity.cuts() else None
