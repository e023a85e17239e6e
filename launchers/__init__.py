"""Long runs on a Slurm cluster: queued through submitit, stopped and taken up again without a trace in the result.

    python -m launchers.train --help        pretraining; launchers.grpo: the same for reward tuning
    python -m launchers.latents --help      a data set's latents; launchers.evaluate: measure a model
    python -m launchers.curate --help       from downloaded shards to training shards
    python -m launchers.array --help        many small pieces of work, by index
    python -m launchers.status RUN          what a run is doing, and what happened to it

submit.py has the command line that they share and fills the run's launch/ folder; job.py is what runs in the job's batch step, beside
the ranks: it starts them with srun and decides what their end means. docs/cluster.md.
"""
