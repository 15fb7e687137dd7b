"""Synthetic chest radiographs ("phantoms") with reports: made from random parameters, without data or licence.

They exist so that the toolkit can be shown, tested and timed by anyone. They are synthetic images of no patient and say
nothing about clinical performance.

    parameters.py   what a phantom is made from: anatomy, findings, film
    sampling.py     draws parameters, with the co-occurrence of findings
    grid.py         coordinates, smooth curves, noise
    anatomy.py      shape of the thorax: lungs, heart, mediastinum, diaphragm, body
    bones.py        ribs, spine, clavicles, shoulders
    ink.py          thin tubes: vessels, lines, wires
    vessels.py      pulmonary vessels
    disease.py      what findings do to the lungs
    devices.py      tubes, catheters, pacemakers
    distractors.py  what may be taken for a finding and is none; lead letters
    profile.py      shape of the thorax from the side
    lateral.py      the lateral film
    lateral_findings.py  findings and devices from the side
    film.py         from attenuation to grey: scatter, noise, exposure, borders
    render.py       all of it, in order
    report.py       findings and impression from the same parameters
    reader.py       labels back from a text
"""
