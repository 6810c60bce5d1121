"""A graph network of PyTorch Geometric: the loader yields batches of graphs."""

import subprocess
from pathlib import Path

import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import BatchNorm, GINConv, global_add_pool

COMMANDS = """
ckptavg average ckpts -o swa.safetensors --last 6
ckptavg bn-refresh swa.safetensors -o refreshed.safetensors \
    --model graphs.py:Net --loader graphs.py:train_loader --estimator torch
ckptavg evaluate ckpts/epoch_9.pt swa.safetensors refreshed.safetensors \
    --model graphs.py:Net --loader graphs.py:held_out
"""


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.convs = nn.ModuleList(
            GINConv(nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width)))
            for inputs in (4, width)
        )
        self.norms = nn.ModuleList(BatchNorm(width) for _ in self.convs)
        self.head = nn.Linear(width, 2)

    def forward(self, graphs):
        nodes = graphs.x
        for conv, norm in zip(self.convs, self.norms):
            nodes = norm(conv(nodes, graphs.edge_index)).relu()
        return self.head(global_add_pool(nodes, graphs.batch))


def data(seed, count):
    """Rings of 8 to 16 nodes; in those of class 1 neighbours are alike."""
    torch.manual_seed(seed)
    graphs = []
    for label in torch.randint(2, (count,)):
        nodes = torch.arange(torch.randint(8, 17, ()))
        edges = torch.stack([nodes, nodes.roll(1)])
        x = torch.randn(len(nodes), 4)
        x = (x + x.roll(1, 0)) / 2**0.5 if label else x
        graphs.append(Data(x=x, edge_index=torch.cat([edges, edges.flip(0)], 1), y=label))
    return graphs


def train_loader(seed=0):
    shuffle = torch.Generator().manual_seed(seed)
    return DataLoader(data(1, 400), batch_size=20, shuffle=True, generator=shuffle)


def held_out():
    return DataLoader(data(2, 400), batch_size=100)


def main():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    Path("ckpts").mkdir()
    for epoch in range(10):
        for graphs in train_loader(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(graphs), graphs.y).backward()
            optimizer.step()
        torch.save({"model": model.state_dict(), "epoch": epoch}, f"ckpts/epoch_{epoch}.pt")
    subprocess.run(["sh", "-exc", COMMANDS], check=True)


if __name__ == "__main__":
    main()
