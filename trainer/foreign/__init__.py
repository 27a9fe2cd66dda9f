"""Weights of other programs that are not in Hugging Face's form: nanoGPT's `ckpt.pt` and llm.c's `.bin`.

In: a file, which may come from anyone. Out: our model and its weights. Start with `nanogpt.py` and `llmc.py`;
`torch_file.py` opens what torch.save wrote without running anything.
"""
