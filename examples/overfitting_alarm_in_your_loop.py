"""The alarm of catastrophic overfitting in a plain PyTorch loop that is not tangentlab's, on anyone's model.

    python examples/overfitting_alarm_in_your_loop.py

FGSM training at an eps where it collapses. The weights before the alarm first speaks are kept; and, the
second time, training takes two steps instead of one while it is raised. Six lines are the alarm's (marked).
Half a minute on a laptop.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn

import tangentlab as tl

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
held_out, x, y = (x[:300], y[:300]), x[300:], y[300:]
eps = 0.28


def network() -> nn.Module:
    torch.manual_seed(0)
    widths = (1, 8, 16, 32, 32)
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(widths[i], widths[i + 1], 3, 1 + (i > 1), 1, bias=False)]
        layers += [nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


def train(*, heed: bool) -> tuple[nn.Module, nn.Module, tl.OverfittingAlarm, int]:
    """The network, the one before the first alarm, the alarm, and how many steps took two gradients."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    alarm = tl.OverfittingAlarm(x[:60], y[:60], eps=eps)  # 1
    kept, crafted_twice = model, 0
    for step in range(1400):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 1400)
        if step % 20 == 0:
            alarm.update(model, step)  # 2
            if alarm.spoke_at is None:  # 3
                kept = copy.deepcopy(model)  # 4
        steps = 2 if heed and alarm.raised else 1  # 5
        crafted_twice += steps == 2
        batch = torch.randint(len(x), (32,))
        x_adv = x[batch]
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_(True)
            loss = nn.functional.cross_entropy(model(x_adv), y[batch])
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv + (eps if steps == 1 else 0.625 * eps) * gradient.sign()
            x_adv = (x[batch] + (x_adv - x[batch]).clamp(-eps, eps)).clamp(0, 1)
        loss = nn.functional.cross_entropy(model(x_adv.detach()), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, kept, alarm, crafted_twice


def robust(model: nn.Module) -> float:
    model.eval()
    adversarial = tl.attacks.PGD(eps, eps / 4, 20)(model, *held_out, generator=tl.generator(0, "example"))
    with torch.no_grad():
        return float((model(adversarial).argmax(1) == held_out[1]).float().mean())


for heed in (False, True):
    model, kept, alarm, twice = train(heed=heed)
    print(f"{'heeding the alarm' if heed else 'FGSM alone'}: robust accuracy {robust(model):.1%}")
    if alarm.spoke_at is None:  # 6
        print("  the alarm was silent")
    else:
        print(f"  the alarm spoke at step {alarm.spoke_at}; the network before it: {robust(kept):.1%}")
    print(f"  {twice} of 1400 steps took two gradients; the alarm cost {alarm.cost / 32:.0f} batches' passes")
