"""The lazy switch in a plain PyTorch loop that is not tangentlab's, on somebody's own model.

    python examples/lazy_switch_in_your_loop.py

PGD training until the kernel is lazy, then one step from each example's last perturbation; back if robust
accuracy on held-out points falls. Six lines are the switch's (marked). A minute on a laptop.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import tangentlab as tl

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
held_out, x, y = (x[:200], y[:200]), x[200:], y[200:]
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.GELU(), nn.Flatten(), nn.Linear(1024, 10)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
eps, crafted, perturbation = 0.15, 0, torch.zeros_like(x)

pgd = tl.attacks.PGD(eps, eps / 4, 10)  # 1
switch = tl.LazySwitch(x[:20], y[:20], every=50, held_out=held_out, guard=pgd)  # 2

for step in range(1000):
    batch = torch.randint(len(x), (64,))
    phase = switch(model, step)  # 3
    steps, start = (10, eps * (2 * torch.rand(64, 1, 8, 8) - 1))
    if phase == "cheap":  # 4
        steps, start = 1, perturbation[batch]
    x_adv = (x[batch] + start).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_(True)
        loss = nn.functional.cross_entropy(model(x_adv), y[batch])
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + (eps / 4 if phase == "full" else eps / 2) * gradient.sign()
        x_adv = (x[batch] + (x_adv - x[batch]).clamp(-eps, eps)).clamp(0, 1)
    perturbation[batch], crafted = x_adv - x[batch], crafted + steps
    loss = nn.functional.cross_entropy(model(x_adv), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

for look in switch.looks:  # 5
    if look.reason:
        print(f"step {look.step}: {look.phase}, as {look.reason}")  # 6
with torch.no_grad():
    adversarial = pgd(model, *held_out, generator=tl.generator(0, "example"))
    robust = (model(adversarial).argmax(1) == held_out[1]).float().mean()
print(f"robust accuracy {robust:.1%}; {crafted} attack steps a batch element instead of 10000")
print(f"the switch's own cost: {switch.cost / 64:.0f} forward passes of a batch")
