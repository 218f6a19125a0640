"""The page's own JavaScript, run by Node."""

import json
import os
import re
import subprocess
from base64 import b64encode
from pathlib import Path

import bitwatt.api.page

PAGE = Path(bitwatt.api.page.__file__).parent


def as_module(name):
    """Return a URL of the file's text and its imports': Node takes a .js file for CommonJS."""
    text = re.sub(
        r'"\./(\w+\.js)"', lambda found: f'"{as_module(found[1])}"', (PAGE / name).read_text()
    )
    return f"data:text/javascript;base64,{b64encode(text.encode()).decode()}"


def evaluate(expressions, **modules):
    """Return what each expression comes to, with the page's files at hand by these names."""
    imports = [f"import * as {name} from '{as_module(file)}';" for name, file in modules.items()]
    code = f"{''.join(imports)}console.log(JSON.stringify([{','.join(expressions)}]));"
    command = ["node", "--no-warnings", "--input-type=module", "--eval", code]
    environment = {**os.environ, "TZ": "UTC"}
    ran = subprocess.run(command, capture_output=True, check=True, env=environment)
    return json.loads(ran.stdout)
