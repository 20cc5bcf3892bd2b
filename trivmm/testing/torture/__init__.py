"""Moves between real VMM processes that are hurt on the way, and what has become of the guest.

``python -m trivmm.testing.torture`` moves a guest from process to process, over unix sockets and tcp, and meanwhile
kills, freezes, signals or cancels one of them, or does something to the link. A trial is

- a **plan** (``plan``): drawn from a seed and the trial's number alone, so that a trial can be had again;
- a **box** (``box``) on the link between the two, which reads the frames' headers and so knows which message is on its
  way, and which does to the link what the plan says;
- **hosts** (``hosts``): the processes, the guest, and what both say;
- a **trial** (``trial``): one migration, the harm, and the look at what is left, as an ``Observation``;
- the **judge** (``judge``): from plan and observation to one copy, in doubt, lost or two copies, and to the list of
  broken promises. What is promised stands in docs/migration.md; the judge is that page as code, and pure.

A guest says by itself whether it runs, and whether its memory and disk are what it wrote: the probe guest, or on
scripted vCPUs one that checks its memory in the same words (``scripted``). Each process writes the guest's serial port
to a file of its own: two that grow are two copies.
"""
