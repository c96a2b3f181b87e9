"""The kernel probe in a plain PyTorch loop that is not tangentlab's, on somebody's own model.

    python examples/probe_in_your_loop.py [FOLDER]

Ten lines are the probe's (marked); the rest is an ordinary loop. Half a minute on a laptop.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import tangentlab as tl

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.GELU(), nn.Flatten(), nn.Linear(1024, 10)
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

eps = 0.1  # 1
inputs = {"clean": None, "fgsm": tl.attacks.FGSM(eps), "pgd": tl.attacks.PGD(eps, eps / 4)}  # 2
probe = tl.KernelProbe(x[:50], y[:50], inputs=inputs)  # 3
run = tl.Run.create(sys.argv[1] if len(sys.argv) > 1 else "runs/mine")  # 4

for step in range(300):
    if step % 20 == 0:  # 5
        seen = probe.measure(model, step)  # 6
        run.write(seen)  # 7
        print(step, f"entropy rank {seen.values['kernel/clean/class/entropy_rank']:.2f}")  # 8
    batch = torch.randint(50, len(x), (64,))
    loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

run.close()  # 9
print(tl.write_report([run.folder], run.folder / "report.html"))  # 10
