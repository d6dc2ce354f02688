"""d2v2ds: data2vec 2.0 pretraining with DeepSpeed ZeRO-3 and a sharded EMA teacher."""

__version__ = "0.1.0"
