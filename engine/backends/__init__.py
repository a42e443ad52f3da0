"""Other ways to compute a stage than our own decoder: today the models of transformers, cut by DeepSpeed AutoTP.

`engine.engine` loads a stage from here when `--backend deepspeed` asks for it. Nothing outside this package imports
transformers or deepspeed, which take seconds.
"""
