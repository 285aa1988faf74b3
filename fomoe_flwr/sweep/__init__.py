"""Sweeps: many runs from one command, over Hydra's sweeper and launcher.

`plan` says which jobs there will be and refuses before anything runs, `job` runs one of them in a
process of its own, `progress` watches them all from the sweep's folder, `table` gathers what came
out, and `command` is the seam to Hydra. `launchers` submits jobs and waits for them, `slurm`
asks what became of them, `queue` remembers it.

    SWEEP/sweep.json        the plan            SWEEP/results.csv, results.parquet   one row a job
    SWEEP/jobs/NAME/        a run directory     SWEEP/jobs/NAME/job.json, job.log    how it went
    SWEEP/queue.json        the jobs that SLURM has
"""
