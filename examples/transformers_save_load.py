"""Save a converted model and load it again, in shards, with the same logits; convert another while it loads."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hwpq_fx

config = LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(config).eval()
batch = torch.randint(1000, (2, 16))

with TemporaryDirectory() as folder:
    dense, sparse = Path(folder, "dense"), Path(folder, "sparse")
    model.save_pretrained(dense)

    hwpq_fx.convert(model, [batch])
    # as model.save_pretrained, but an interrupted save leaves an older checkpoint in the same place whole
    hwpq_fx.save_pretrained(model, sparse, max_shard_size="200KB")
    print("files:", ", ".join(sorted(path.name for path in sparse.iterdir())))

    # in a new process, `import hwpq_fx` is all that from_pretrained needs
    loaded = AutoModelForCausalLM.from_pretrained(sparse)
    with torch.no_grad():
        print("same logits:", torch.equal(loaded(batch).logits, model(batch).logits))
    print(hwpq_fx.report(loaded).summary())

    # without calibration, straight from the dense checkpoint
    quantization = hwpq_fx.HWPQTransformersConfig(targets=["re:.*mlp.*"])
    free = AutoModelForCausalLM.from_pretrained(dense, quantization_config=quantization)
    packed = [name for name, one in free.named_parameters() if isinstance(one, hwpq_fx.Float8Sparse24Tensor)]
    print(f"{len(packed)} weights 2:4 while loading, {packed[0]} the first")
