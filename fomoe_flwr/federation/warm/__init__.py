"""Warm workers: a process beside the SuperNode that keeps what Flower's own would build every time.

Flower starts a new process for every message. Here that process hands the message to one that
stays. What runs in Flower's process imports no torch:

    handover   Flower's side: find or start the worker, hand the task over, once more if it dies
    process    the worker: takes one task at a time until it is idle for too long or told to end
    folder     where the two meet: socket, token, lock and log of one worker
    handshake  both prove that they know the token and run the same code
    frames     what the socket carries: a JSON header and raw bytes, both limited, no pickle
    contents   a message's records as a frame
"""
