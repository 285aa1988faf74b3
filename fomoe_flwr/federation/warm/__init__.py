"""Warm workers: processes beside the SuperNode that keep what every task needs.

Flower starts a new process for every message. That process hands the message to a warm worker, a
process that stays. The code that runs in Flower's process imports no torch.

    handover   Flower's side: find or start the worker, hand it the task, try again if it dies
    process    the worker: takes one task at a time until it is idle for too long or told to end
    folder     where both sides meet: socket, token, lock and log of one worker
    handshake  both sides prove that they know the token and run the same code
    frames     what the socket carries: a JSON header and raw bytes, both limited, no pickle
    contents   a message's records as a frame
"""
