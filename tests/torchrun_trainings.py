"""Several trainings one after the other in the processes of one `torchrun`, each of which starts for seconds.

Told as JSON: {"NAME": {"arguments": […] for train.py, "port": where the first process listens}}. What each process says
goes to NAME.RANK.out in the current folder. Only the first one's report is drawn, which takes longer than the training.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import train

if __name__ == "__main__":
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # whose keys the first training has used
    for name, training in json.loads(sys.argv[1]).items():
        os.environ["MASTER_PORT"] = str(training["port"])
        with Path(f"{name}.{os.environ['RANK']}.out").open("w") as out, contextlib.redirect_stdout(out):
            if train.main(training["arguments"]):
                sys.exit(f"{name} failed")
        train.write_report = lambda folder, *_: folder.mkdir(exist_ok=True)
