"""Parts of `fit` and `finetune`: data, order, objectives, the loop, and what it leaves."""
