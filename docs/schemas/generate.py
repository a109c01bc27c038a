"""Write the JSON Schemas of all documents beside this file, from the structs that read them: `make schemas`."""

from __future__ import annotations

import json
from pathlib import Path

from isthmus.artifacts.bundle import BUNDLE
from isthmus.artifacts.fidelity import FIDELITY
from isthmus.artifacts.grant import GRANT
from isthmus.artifacts.json_documents import schema
from isthmus.artifacts.leak import LEAK
from isthmus.artifacts.plan import PLAN
from isthmus.artifacts.profile import PROFILE

for kind in (BUNDLE, PLAN, PROFILE, FIDELITY, LEAK, GRANT):
    path = Path(__file__).with_name(f"{kind.name}.schema.json")
    path.write_text(json.dumps(schema(kind), indent=1) + "\n")
