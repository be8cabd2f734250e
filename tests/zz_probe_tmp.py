import os, subprocess, sys, shutil, json, torch
from pathlib import Path
from conftest import *
import pytest
def test_x(tiny_model_folder, tmp_path):
    from saezoo.sae import SAE, SAEConfig
    r=torch.Generator().manual_seed(0)
    shapes={"W_enc":(16,32),"b_enc":(32,),"W_dec":(32,16),"b_dec":(16,)}
    t={n: torch.randn(s,generator=r) for n,s in shapes.items()}
    f=SAE(SAEConfig(16,32,"blocks.1.hook_resid_pre","tiny",32,True,True,True),t).save(tmp_path/"sae")
    os.chdir(tmp_path)
    (tmp_path/"a.txt").write_text("Hello world, here is text. "*200+"<|endoftext|>"+"Another document. "*100)
    def go(*a):
        d=subprocess.run([sys.executable,"-m","saezoo",*a],capture_output=True,text=True,env=os.environ|{"PYTHONPATH":"/work/main","HF_HOME":str(tmp_path/"h"),"HF_HUB_OFFLINE":"1"})
        print("$",*a,"->",d.returncode); print(d.stdout[-1800:]); print("ERR",d.stderr[-900:])
    base=["eval","sae","--model",str(tiny_model_folder),"--text","a.txt","--tokens","512"]
    go(*base,"--csv","-")
    for extra in (["--seed","-1"],["--seed","99999999999999999999"],["--device","meta"],["--dtype","float8_e5m2"],["--batch-size","100000000"],["--json","-","--csv","-"],["--dtype","float16"],["--device","nope"],["--tokens","10"],["--layout","x"],["--protocol","feb2024"]):
        go(*base,*extra)
    go("eval","sae"); go("eval","nofolder"); go("eval","sae","--model","nope","--offline"); go("eval","sae","--model","nope/x/y")
    go("eval","sae","--model",str(tiny_model_folder),"--text","nope.txt")
    go("eval","--json","sae","--model",str(tiny_model_folder))
    go(); go("info","gpt2-small-res"); go("eval","gpt2-small-res","0","--offline"); go("reproduce","gpt2-small-res","0","--out","sae"); go("reproduce","gpt2-small-res","0","--out","a.txt"); go("--registry","nope","list")
    go("eval","sae","--model",str(tiny_model_folder),"--dataset","openwebtext","--offline")
