"""Several processes that train one model: gradients are averaged before the Gram matrix.

`group` exchanges small messages, `agreement` compares settings and raises in all processes,
`replicated` averages gradients of whole parameters, `sharded` those of `DTensor` parameters.
"""
