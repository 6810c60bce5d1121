"""The vocabulary grew during the run, and only its first checkpoints have a rotary buffer."""

import subprocess
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

COMMANDS = """
ckptavg average ckpts -o swa.safetensors --last 6 --take-last '^embed' --skip 'inv_freq$'
ckptavg evaluate ckpts/epoch_7.pt swa.safetensors --metric accuracy \
    --model vocabulary.py:Net --loader vocabulary.py:held_out
"""


class Net(nn.Module):
    """Finds the largest of five tokens."""

    def __init__(self, tokens=12, saves_buffer=False):
        super().__init__()
        self.embed = nn.Embedding(tokens, 32)
        frequencies = 100 ** -torch.linspace(0, 1, 16)
        self.register_buffer("inv_freq", frequencies, persistent=saves_buffer)
        self.mix = nn.MultiheadAttention(32, 2, batch_first=True)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(160, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, tokens):
        angles = torch.arange(5)[:, None] * self.inv_freq
        left, right = self.embed(tokens).chunk(2, -1)
        turned = (
            left * angles.cos() - right * angles.sin(),
            left * angles.sin() + right * angles.cos(),
        )
        x = torch.cat(turned, -1)
        return self.body(x + self.mix(x, x, x)[0]) @ self.embed.weight.T


def data(seed, tokens=12, count=2000, wrong=0.0):
    """Five tokens, and the largest of them; a share of the answers is wrong."""
    torch.manual_seed(seed)
    inputs, others = torch.randint(tokens, (count, 5)), torch.randint(tokens, (count,))
    return TensorDataset(inputs, torch.where(torch.rand(count) < wrong, others, inputs.amax(1)))


def held_out():
    return DataLoader(data(seed=1, count=500), batch_size=100)


def main():
    torch.manual_seed(0)
    net = Net(tokens=10, saves_buffer=True)
    Path("ckpts").mkdir()
    for epoch in range(8):
        if epoch == 3:  # two new tokens; a newer version of the code does not save the buffer
            old, net = net.state_dict(), Net()
            embed = torch.cat([old.pop("embed.weight"), net.embed.weight.detach()[10:]])
            net.load_state_dict({**old, "embed.weight": embed}, strict=False)
        if epoch in (0, 3):
            optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
        examples = data(epoch + 2, len(net.embed.weight), wrong=0.2)
        for inputs, targets in DataLoader(examples, batch_size=50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), targets).backward()
            optimizer.step()
        torch.save({"model": net.state_dict(), "epoch": epoch}, f"ckpts/epoch_{epoch}.pt")
    subprocess.run(["sh", "-exc", COMMANDS], check=True)


if __name__ == "__main__":
    main()
