"""EleutherAI's lm_eval on a converted model, with a task of our own from local files. Needs `pip install lm-eval`.

For a task of lm_eval's (`tasks=["hellaswag"]`) leave the TaskManager out. The model here knows nothing: it is random.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import hwpq_fx

TASK = """
task: which_is_next
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "after {{{{number}}}} comes"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""

words = ["<unk>", "<eos>", "after", "comes", *map(str, range(60))]
tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")

config = LlamaConfig(
    vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config).eval()
model = hwpq_fx.convert(model, [torch.randint(len(words), (4, 16))])
print(hwpq_fx.report(model))  # 7 layers 2:4

with TemporaryDirectory() as folder:
    file = Path(folder, "questions.jsonl")
    questions = [{"number": n, "choices": [str(n + 1), str(n + 7)], "answer": 0} for n in range(20)]
    file.write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    Path(folder, "task.yaml").write_text(TASK.format(file=file.as_posix()), encoding="utf-8")
    result = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=fast, device="cpu", batch_size=4),
        tasks=["which_is_next"],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        bootstrap_iters=0,
    )
print("lm_eval:", result["results"]["which_is_next"])
