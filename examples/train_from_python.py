"""Train, evaluate and report from Python: the same as ``tangentlab train digits --method fgsm``.

python examples/train_from_python.py [FOLDER]
"""

import sys

import tangentlab as tl

config = tl.load_config("digits", ["--method", "fgsm", "--training.epochs", "5"])
run = tl.train(config, sys.argv[1] if len(sys.argv) > 1 else "runs/digits-fgsm")
print({line["attack"]: line["accuracy"] for line in run.evaluations if line["checkpoint"] == "last"})
print(tl.write_report([run.folder], run.folder / "report.html"))
