"""A GAN with spectral norm in both networks, and BatchNorm in the generator."""

import subprocess
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

COMMANDS = """
ckptavg average ckpts -o swa.safetensors --key generator --last 8
ckptavg bn-refresh swa.safetensors -o refreshed.safetensors \
    --model spectral_gan.py:make_generator --loader spectral_gan.py:noise_loader
ckptavg evaluate ckpts/step_800.pt --key generator --metric spectral_gan.py:energy_distance \
    --model spectral_gan.py:make_generator --loader spectral_gan.py:held_out
ckptavg evaluate swa.safetensors refreshed.safetensors --metric spectral_gan.py:energy_distance \
    --model spectral_gan.py:make_generator --loader spectral_gan.py:held_out
ckptavg average ckpts -o gan.pt --key generator --key discriminator --last 8
"""


def make_generator(width=32):
    first = spectral_norm(nn.Linear(4, width)), nn.BatchNorm1d(width), nn.ReLU()
    second = spectral_norm(nn.Linear(width, width)), nn.BatchNorm1d(width), nn.ReLU()
    return nn.Sequential(*first, *second, nn.Linear(width, 2))


def make_discriminator(width=32):
    first, second = nn.Linear(2, width), nn.Linear(width, width)
    layers = first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), nn.Linear(width, 1)
    return nn.Sequential(*(spectral_norm(x) if isinstance(x, nn.Linear) else x for x in layers))


def real(count):
    """Points `[count, 2]` around eight places on a circle."""
    angles = torch.randint(8, (count,)) * torch.pi / 4
    return 2 * torch.stack([angles.cos(), angles.sin()], 1) + 0.1 * torch.randn(count, 2)


def noise_loader(batches=40, size=64):
    """What flows through the generator in training is noise; there is nothing to shuffle."""
    return torch.randn(batches, size, 4, generator=torch.Generator().manual_seed(0))


def held_out():
    torch.manual_seed(1)
    return [(torch.randn(1000, 4), real(1000))]


def energy_distance(model, batches):
    """The distance of generated points from real ones (Szekely and Rizzo 2013)."""
    [(generated, points)] = [(model(noise), points) for noise, points in batches]
    within = torch.cdist(generated, generated).mean() + torch.cdist(points, points).mean()
    return 2 * torch.cdist(generated, points).mean() - within


def main():
    torch.manual_seed(0)
    generator, discriminator = make_generator(), make_discriminator()
    networks = generator, discriminator
    g, d = (torch.optim.Adam(net.parameters(), lr=0.002, betas=(0.5, 0.9)) for net in networks)
    Path("ckpts").mkdir()
    for step in range(1, 801):
        generated = generator(torch.randn(64, 4))
        d.zero_grad()
        loss = (1 - discriminator(real(64))).relu() + (1 + discriminator(generated.detach())).relu()
        loss.mean().backward()
        d.step()
        g.zero_grad()
        (-discriminator(generated).mean()).backward()
        g.step()
        if step % 50 == 0:
            both = {
                "generator": generator.state_dict(),
                "discriminator": discriminator.state_dict(),
            }
            torch.save(both | {"step": step}, f"ckpts/step_{step}.pt")
    subprocess.run(["sh", "-exc", COMMANDS], check=True)


if __name__ == "__main__":
    main()
