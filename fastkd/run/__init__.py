"""What a run keeps on the disk, and how it goes on from there.

folder.py        who may use the folder of a run, what it was started with, finished runs
lock.py          one run at a time in a folder
checkpoint.py    the states of a training: written by a thread, whole or not at all, with a checksum
pace.py          when a state is saved, and whether the run is to stop
problems.py      what is wrong with a state that was read
resume.py        the newest state that is whole; whether it belongs to this run
phase.py         the states of a training before the first epoch, such as that of an auto-encoder
ranks.py         a state of N processes for a run of M
random_state.py  the random generators that a training may draw from
diverged.py      a run whose numbers are not finite any more
"""
