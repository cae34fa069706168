"""What all benchmarks beside other libraries share: each system has a process of its own, and none stops the others.

    base    what a benchmark and a system are
    run     the run: one system after the other, what each measured as entries
    child   the process of one system: `python -m trimtab.evaluation.beside.child JOB`

Of these only `run` loads torch: the process that measures llama.cpp holds none.
"""
