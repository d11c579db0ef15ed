"""Training reaches everything, with the right numbers."""

from __future__ import annotations

import torch

from heedful.kept import forget
from heedful.testing.mixer.check import check
from heedful.testing.subject import (
    DIFFERENCE_STEP,
    DIFFERENCE_TOLERANCE,
    Subject,
    assert_finite,
    functional,
    noise,
    run,
    seeded,
)


@check()
def parameter_gradients(subject: Subject) -> None:
    """Every parameter gets a finite gradient that is not zero for two random inputs."""
    mixer = subject.make(dtype=torch.float64, train=True)
    reached = dict.fromkeys((n for n, p in mixer.named_parameters() if p.requires_grad), False)
    for seed in (0, 1):
        mixer.zero_grad()
        with seeded(seed):
            y = run(mixer, mixer.example_inputs(length=17, dtype=torch.float64, seed=seed))
        loss = functional(y) + sum(mixer.aux_losses.values())
        if loss.requires_grad:
            loss.backward()
        for name, parameter in mixer.named_parameters():
            if parameter.grad is not None:
                assert_finite(parameter.grad, f"the gradient of {name}")
                if name in reached:
                    reached[name] |= bool(parameter.grad.any())
    dead = [name for name, alive in reached.items() if not alive]
    assert not dead, f"expected a gradient that is not zero for {', '.join(dead)}"


@check()
def input_gradient(subject: Subject) -> None:
    """The gradient of the output reaches x, finite and not zero."""
    mixer = subject.make(dtype=torch.float64, train=True)
    inputs = mixer.example_inputs(dtype=torch.float64)
    inputs["x"].requires_grad_()
    with seeded(0):
        y = run(mixer, inputs)
    assert y.requires_grad, "expected the output to depend on x differentiably"
    (grad,) = torch.autograd.grad(functional(y), inputs["x"], materialize_grads=True)
    assert_finite(grad, "the gradient of x")
    assert bool(grad.any()), "expected a gradient of x that is not zero"


@check()
def training_after_inference(subject: Subject) -> None:
    """What a pass in torch.inference_mode keeps serves the training that follows."""
    mixer = subject.make(dtype=torch.float64)
    inputs = mixer.example_inputs(dtype=torch.float64)
    forget()
    with torch.inference_mode():
        run(mixer, inputs)
    inputs["x"].requires_grad_()
    torch.autograd.grad(functional(run(mixer, inputs)), inputs["x"], materialize_grads=True)


@check()
def gradient_values(subject: Subject) -> None:
    """Backward agrees with central differences along a random direction of x and all parameters."""
    mixer = subject.make(dtype=torch.float64)
    inputs = mixer.example_inputs(dtype=torch.float64)
    inputs["x"].requires_grad_()
    leaves = [inputs["x"], *(p for p in mixer.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(functional(run(mixer, inputs)), leaves, materialize_grads=True)
    direction = [noise(leaf, seed) for seed, leaf in enumerate(leaves)]
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    bound = sum(g.square().sum() * d.square().sum() for g, d in zip(grads, direction, strict=True)) ** 0.5
    values = []
    with torch.no_grad():
        for step in (DIFFERENCE_STEP, -DIFFERENCE_STEP):
            for leaf, d in zip(leaves, direction, strict=True):
                leaf += step * d
            values.append(functional(run(mixer, inputs)))
            for leaf, d in zip(leaves, direction, strict=True):
                leaf -= step * d
    difference = (values[0] - values[1]) / (2 * DIFFERENCE_STEP)
    found = ((slope - difference).abs() / (bound + 1e-30)).item()
    assert found <= DIFFERENCE_TOLERANCE, (
        f"expected backward to give the slope {float(difference):.8g} of central differences, "
        f"got {float(slope):.8g}; relative error {found:.1e}, accepted {DIFFERENCE_TOLERANCE:.0e}"
    )
