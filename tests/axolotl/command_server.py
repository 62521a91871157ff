"""The command `axolotl`, each call in a fork of this process, which has imported what the commands import: that takes
ten seconds, and is the same every time. Nothing has been called here: our plugin is brought in by the call.

Reads a line of JSON for each call: its arguments, directory, and the files of its input and output. Answers with the
exit code.
"""

import importlib
import json
import os
import sys

# what the commands import when they are called
COMMANDS = ["evaluate", "inference", "merge_lora", "preprocess", "train"]
MODULES = [
    *(f"cli.{command}" for command in COMMANDS),
    "evaluate",
    "train",
    "common.datasets",
    "core.builders",
]


def serve(calls, answers):
    """Returns in a fork, which is then the process of its call; the server ends with its input."""
    for line in calls:
        call = json.loads(line)
        child = os.fork()
        if not child:
            os.dup2(os.open(call["input"], os.O_RDONLY), 0)
            os.dup2(os.open(call["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            os.chdir(call["directory"])
            sys.argv = ["axolotl", *call["arguments"]]
            return
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()
    os._exit(0)


if __name__ == "__main__":  # and not in a process that a call spawns
    streams = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed while importing is no answer
    from axolotl.cli.main import main  # as the installed script does, and first

    for module in MODULES:
        importlib.import_module(f"axolotl.{module}")
    serve(*streams)
    sys.exit(main())
