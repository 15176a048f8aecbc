"""Example models and data for jaxcode; not part of the installed library.

===============  =====================================================================================
``demo``         ``python -m models.demo``: a LeNet5 answers although a third of its workers never reply
``compare``      ``python -m models.compare``: every code and a tuned one on a trained network, at several sizes
``comparison``   schemes on the same inputs and the same stragglers
``plots``        the demo's two pictures
``lenet5``       LeNet5 as ``flax.nnx`` and as ``flax.linen`` module
``resnet``       a small residual network as ``flax.nnx`` module
``train``        a short training loop for ``flax.nnx`` classifiers
``weights``      trained weights in safetensors files
``datasets``     scikit-learn's digits, MNIST and CIFAR-10 from files on disk
===============  =====================================================================================
"""
