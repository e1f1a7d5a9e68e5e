"""What the passes make of a graph: a small MLP before and after."""

import torch

import hwpq_fx

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).eval()
example = torch.randn(4, 64)
hwpq_fx.convert(model, [example])
print(hwpq_fx.explain(model, example))
